"""examples/: an ordinary script and its port have the same validation curve, the same end and the same best epoch."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run, check, lines, start, steps_done, until

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # rounding of sums in another order, over some 400 steps


@cache
def script(folder: Path) -> tuple[list[tuple[float, float, float]], int]:
    """Run the script; return loss, accuracy and learning rate of each epoch, and the best epoch."""
    command = [sys.executable, str(ROOT / "examples" / "tutorial.py")]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.findall(r"^epoch \d+ loss (\S+) accuracy (\S+) lr (\S+)$", said, re.MULTILINE)
    best = re.search(r"^best loss \S+ after epoch (\d+)$", said, re.MULTILINE)
    assert best is not None
    return [(float(loss), float(accuracy), float(rate)) for loss, accuracy, rate in found], int(best[1])


def check_port(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    epochs, best = script(tmp_path_factory.getbasetemp())
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


def test_the_port_has_the_scripts_curve(run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On one process; another test goes on with two."""
    for name in ("ported_task.py", "ported.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    check(run("distrib", "launch", "--processes", 1, "ported.yaml"))
    check_port(tmp_path / "runs" / "ported", tmp_path_factory)


def test_after_a_kill(mark: str, run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On one process more than before."""
    for name in ("ported_task.py", "ported.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    folder = tmp_path / "runs" / "ported"
    process = start(mark, tmp_path, "train", "ported.yaml")
    until(lambda: steps_done(folder) > 100, "it does not begin")
    process.kill()
    process.communicate()
    check(run("distrib", "launch", "--processes", 2, "ported.yaml"))
    check_port(folder, tmp_path_factory)
    assert {line["world_size"] for line in lines(folder)} == {1, 2}
