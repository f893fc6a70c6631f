"""examples/: an ordinary script and its port have the same validation curve, the same end and the same best epoch."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run, check, lines, no_process_left, run_page, start, starter, steps_done, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("examples")]  # the script runs once
TOLERANCE = 1e-5  # rounding of sums in another order, over some 400 steps


Script = tuple[list[tuple[float, float, float]], int]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Script]:
    """Run the commands of docs/from-a-script.md. Return the folder of the port's run, on two processes, and what the
    script printed: loss, accuracy and learning rate of each epoch, and the best epoch."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("runs", "*.pt"))
    with no_process_left() as mark:
        said, _, evaluated = run_page(ROOT / "docs" / "from-a-script.md", starter(mark, folder), folder)
    found = re.findall(r"^epoch \d+ loss (\S+) accuracy (\S+) lr (\S+)$", said, re.MULTILINE)
    best = re.search(r"^best loss (\S+) after epoch (\d+)$", said, re.MULTILINE)
    assert best is not None
    assert f"eval/loss {float(best[1]):.3f}" in evaluated
    epochs = [(float(loss), float(accuracy), float(rate)) for loss, accuracy, rate in found]
    return folder / "examples" / "runs" / "ported", (epochs, int(best[2]))


def check_port(run: Path, script: Script) -> None:
    epochs, best = script
    assert 5 < len(epochs) < 40  # it was stopped, after its rate was reduced
    assert len({rate for _, _, rate in epochs}) > 2
    found = lines(run, "evals.jsonl")
    assert [line["step"] for line in found] == [30 * (epoch + 1) for epoch in range(len(epochs))]
    losses = [line["metrics"]["eval/loss"] for line in found]
    np.testing.assert_allclose(losses, [loss for loss, _, _ in epochs], rtol=TOLERANCE)
    accuracies = [line["metrics"]["eval/accuracy"] for line in found]
    np.testing.assert_allclose(accuracies, [accuracy for _, accuracy, _ in epochs], atol=1e-9)  # as it is printed
    assert [lines(run)[30 * epoch]["lr"] for epoch in range(len(epochs))] == [rate for _, _, rate in epochs]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["best"]["step"]) == (30 * len(epochs), 30 * best)


def test_the_commands_of_the_page(page: tuple[Path, Script]) -> None:
    """They end with a run on two processes."""
    check_port(*page)
    assert {line["world_size"] for line in lines(page[0])} == {2}


def test_the_port_has_the_scripts_curve(run: Run, tmp_path: Path, page: tuple[Path, Script]) -> None:
    """On one process."""
    for name in ("ported_task.py", "ported.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    check(run("distrib", "launch", "--processes", 1, "ported.yaml"))
    check_port(tmp_path / "runs" / "ported", page[1])


def test_after_a_kill(mark: str, run: Run, tmp_path: Path, page: tuple[Path, Script]) -> None:
    """On one process more than before."""
    for name in ("ported_task.py", "ported.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    folder = tmp_path / "runs" / "ported"
    process = start(mark, tmp_path, "train", "ported.yaml")
    until(lambda: steps_done(folder) > 100, "it does not begin")
    process.kill()
    process.communicate()
    check(run("distrib", "launch", "--processes", 2, "ported.yaml"))
    check_port(folder, page[1])
    assert {line["world_size"] for line in lines(folder)} == {1, 2}
