"""Options of the strategies: which change losses and which do not, and what memory a rank needs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import COMPRESSED, OPTIONS, PRECISIONS, SHARDED
from conftest import Run, check, lines, losses, results

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

ROUNDING = 1e-5  # see test_parity
# Measured: 1.4e-4, the largest relative difference of a loss over the 12 steps. Gradients are rounded to 8 bits (0.4 %)
# once a step, and their errors are of both signs.
COMPRESSION = 1e-3


@pytest.fixture(scope="module")
def together(world: Callable[[int], Path]) -> Path:
    return world(2)


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_strategies_agree_in_every_precision(together: Path, strategy: str, precision: str) -> None:
    run, expected = together / f"{strategy}-{precision}", together / f"ddp-{precision}"
    np.testing.assert_allclose(losses(run), losses(expected), rtol=ROUNDING)
    assert [line.get("loss_scale") for line in lines(run)] == [line.get("loss_scale") for line in lines(expected)]
    if precision != "no":
        assert losses(run) != losses(together / f"{strategy}-no")  # autocast was really there


@pytest.mark.parametrize("option", OPTIONS)
def test_options_do_not_change_losses(together: Path, option: str) -> None:
    np.testing.assert_allclose(losses(together / option), losses(together / "ddp-no"), rtol=ROUNDING)


@pytest.mark.parametrize("strategy", SHARDED)
def test_parameter_groups_of_a_tasks_optimizer(together: Path, strategy: str) -> None:
    np.testing.assert_allclose(losses(together / f"{strategy}-groups"), losses(together / "ddp-groups"), rtol=ROUNDING)


@pytest.mark.parametrize("strategy", [*SHARDED, "bitwise"])
def test_scalars_and_other_memory_formats(together: Path, strategy: str) -> None:
    run, expected = together / f"{strategy}-formats", together / "ddp-formats"
    np.testing.assert_allclose(losses(run), losses(expected), rtol=ROUNDING)


def test_unused_parameters_with_find_unused_parameters(together: Path) -> None:
    assert {line["verdict"] for line in lines(together / "ddp-unused")} == {"applied"}
    assert losses(together / "ddp-unused")[-1] < losses(together / "ddp-unused")[0]


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_unused_parameters_are_refused(run: Run, tmp_path: Path, strategy: str) -> None:
    """Otherwise DeepSpeed and fully_shard would silently mix gradients of different parameters, and DDP would make its
    first update with unreduced gradients."""
    config = {"task": {"target": "tasks:Unused"}, "data": {"global_batch_size": 16, "micro_batch_size": 4}}
    (tmp_path / "unused.yaml").write_text(yaml.safe_dump({**config, "train": {"steps": 5}}))
    result = run("distrib", "launch", "--processes", 2, "unused.yaml", f"strategy.name={strategy}")
    check(result, code=1)
    assert "7 parameter(s) got no gradient from a micro-batch, first " in result.stderr
    assert not lines(tmp_path / "runs" / "unused")  # the second micro-batch of the first step


@pytest.mark.parametrize("strategy", COMPRESSED)
def test_gradients_in_bf16_are_rounded(together: Path, strategy: str) -> None:
    got, exact = losses(together / f"{strategy}-compressed"), losses(together / "ddp-no")
    np.testing.assert_allclose(got, exact, rtol=COMPRESSION)
    assert not np.allclose(got, exact, rtol=ROUNDING)  # they were rounded
    assert got[0] == exact[0]  # but the totals were not


def test_fsdp2_with_communication_in_bf16(together: Path) -> None:
    """Parameters and gradients are communicated in bf16, so normalisation layers get rounded weights, unlike under
    ddp."""
    got, full = losses(together / "fsdp2-compressed-bf16"), losses(together / "ddp-no")
    np.testing.assert_allclose(got, full, rtol=0.003)  # as bf16 alone, see test_verdicts
    assert got != losses(together / "fsdp2-bf16")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_memory_of_a_rank_matches_the_plan(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    for rank in range(processes):
        found = results(world(processes), rank)["memory"][strategy]
        assert found["parameters"] == pytest.approx(found["planned_parameters"], rel=0.05)
        assert found["average"] == pytest.approx(found["planned_average"], rel=0.05)
        planned = found["planned_parameters"] + found["planned_optimizer_state"] + found["planned_average"]
        if strategy in ("ddp", "zero3"):  # their buckets for gradients stay
            planned += found["planned_gradients"]
        assert found["all"] == pytest.approx(planned, rel=0.05)


def test_zero3_gathers_no_more_after_an_early_evaluation(world: Callable[[int], Path]) -> None:
    after_evaluation, between_steps, never = results(world(2))["gathers"]
    assert after_evaluation == between_steps == never > 0


def test_deepspeed_compiles_no_extension(world: Callable[[int], Path]) -> None:
    for processes in (1, 2, 4):
        extensions = world(processes) / "extensions"
        assert not extensions.exists() or not list(extensions.rglob("*"))
