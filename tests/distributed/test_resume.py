"""Runs that are interrupted and resumed on the same or another number of processes, or under another strategy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import EVERY, FEW, resumed
from conftest import Run, check, check_same, interrupted, lines, losses, refused, tensors

from distrib.run_folder.verify import verify_run

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]


@pytest.mark.parametrize(("processes", "name"), [(world, name) for world in (1, 2, 4) for name in resumed(world)])
def test_a_resume_on_the_same_number_of_processes_has_the_same_bits(
    world: Callable[[int], Path], processes: int, name: str
) -> None:
    run = world(processes) / f"{name}-resumed"
    check_same(run, world(processes) / name)
    assert [event["step"] for event in lines(run, "events.jsonl") if event["event"] == "resumed"] == [EVERY]


def test_one_run_under_four_strategies_on_four_two_and_one_processes(
    world: Callable[[int], Path], run: Run, tmp_path: Path
) -> None:
    undisturbed = world(4) / "ddp-no"
    ways = [(2, "zero3", EVERY), (2, "fsdp2", 2 * EVERY), (1, "single", 2 * EVERY)]
    before = undisturbed
    for number, (processes, strategy, after) in enumerate(ways):
        folder = interrupted(before, tmp_path / f"run-{number}", after)
        config = folder / "config.yaml"
        override = f"strategy.name={strategy}"
        check(run("distrib", "launch", "--processes", processes, config, override, "--run-dir", folder))
        resumption = [event for event in lines(folder, "events.jsonl") if event["event"] == "resumed"][-1]
        assert resumption["step"] == after
        found = [(line["world_size"], line["strategy"]) for line in lines(folder)[after:]]
        assert set(found) == {(processes, strategy)}
        np.testing.assert_allclose(losses(folder), losses(undisturbed), rtol=1e-5)  # see test_parity
        for key in ("samples", "lr", "count"):
            assert [line[key] for line in lines(folder)] == [line[key] for line in lines(undisturbed)]
        assert verify_run(folder).steps == FEW
        before = folder
    # Adam divides by the root of the second moment. If that is near 0, it amplifies rounding of the gradient.
    expected = tensors(undisturbed)
    for name, value in tensors(before).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_stream_resumes_only_on_the_same_number_of_processes(
    world: Callable[[int], Path], run: Run, tmp_path: Path
) -> None:
    folder = interrupted(world(2) / "stream-0", tmp_path / "run", EVERY)
    line = refused(run("distrib", "train", folder / "config.yaml", "--run-dir", folder))
    assert "Tokens is a stream that 2 process(es) had read; 1 cannot continue it" in line


def test_a_stream_that_is_not_split_between_ranks_is_refused(run: Run, tmp_path: Path) -> None:
    config = {"task": {"target": "tasks:Streamed", "split": False}, "train": {"steps": 5}}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(config))
    line = refused(run("distrib", "launch", "--processes", 2, "same.yaml"))
    assert "ranks 0 and 1 read the same samples of the stream; split it" in line
