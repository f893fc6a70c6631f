"""Each sample is evaluated exactly once, and metrics have the same bits for any number of processes and any
strategy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import FEW
from conftest import BIN, Run, check, lines, results

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_metrics_have_the_same_bits_on_any_number_of_processes(world: Callable[[int], Path], processes: int) -> None:
    """The task itself asserts that all samples are there, in order."""
    alone = results(world(1))["evaluations"]
    found = results(world(processes))["evaluations"]
    assert len(found) == 39 * (3 + 2)
    for key, metrics in found.items():
        _, case = key.split(": ")
        assert metrics == alone[f"auto: {case}"], key


def test_every_rank_gets_the_metrics(world: Callable[[int], Path]) -> None:
    assert results(world(2), 1)["evaluations"] == results(world(2), 0)["evaluations"]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_sharded_run_is_evaluated_by_any_number_of_processes(
    world: Callable[[int], Path], run: Run, strategy: str
) -> None:
    """By three, which divide neither the batch nor its micro-batches; and by one."""
    trained = world(2) / f"{strategy}-no"
    (during,) = lines(trained, "evals.jsonl")
    expected = "eval/loss {eval/loss:.4f}  eval/right {eval/right:.4f}".format_map(during["metrics"])
    assert during["step"] == FEW
    three = [BIN / "torchrun", "--standalone", "--nproc_per_node", 3, "-m", "distrib"]
    for command in (three, ["distrib"]):
        assert check(run(*command, "evaluate", trained)).count(expected) == 1
