"""train.determinism: bitwise has the same bits on 1, 2, 4 and 8 processes, and in a run that changed their number."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cases import BITWISE, EVERY
from conftest import Run, check, check_same, interrupted, lines

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]


@pytest.mark.parametrize("precision", BITWISE)
@pytest.mark.parametrize("processes", [2, 4])
def test_bitwise_runs_have_the_same_bits(world: Callable[[int], Path], processes: int, precision: str) -> None:
    """With dropout and clipping."""
    run = world(processes) / f"bitwise-{precision}"
    assert {line["world_size"] for line in lines(run)} == {processes}
    check_same(run, world(1) / f"bitwise-{precision}")


def test_bitwise_runs_on_eight_processes(world: Callable[[int], Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "eight.yaml").write_text(yaml.safe_dump(BITWISE["no"]))
    check(run("distrib", "launch", "--processes", 8, "eight.yaml", timeout=170))
    check_same(tmp_path / "runs" / "eight", world(1) / "bitwise-no")


def test_a_bitwise_run_may_change_its_number_of_processes(
    world: Callable[[int], Path], run: Run, tmp_path: Path
) -> None:
    alone = world(1) / "bitwise-no"
    first = interrupted(world(4) / "bitwise-no", tmp_path / "first", EVERY)
    check(run("distrib", "train", first / "config.yaml", "--run-dir", first))
    check_same(first, alone)
    second = interrupted(first, tmp_path / "second", 2 * EVERY)
    check(run("distrib", "launch", "--processes", 2, second / "config.yaml", "--run-dir", second))
    check_same(second, alone)
    assert [line["world_size"] for line in lines(second)] == [4] * EVERY + [1] * EVERY + [2] * 2
