"""Loops of one's own with two models: each model's steps count, and a resumed run has the same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import lines, results, tensors
from own_loops import BAD, EVERY, STEPS, WIDE_CASES

from distrib.run_folder.verify import verify_run

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

NAN = "skipped:nonfinite_loss"
World = Callable[[int], Path]
worlds = pytest.mark.parametrize("processes", [1, 2])


def skipped(run: Path) -> list[tuple[int, str, str]]:
    found = [event for event in lines(run, "events.jsonl") if event["event"] == "skipped"]
    return [(event["step"], event["model"], event["verdict"]) for event in found]


@worlds
@pytest.mark.parametrize(
    ("case", "model"), [("own-nan", "second"), ("own-bitwise-nan", "second"), ("own-first-nan", "first")]
)
def test_a_step_that_one_model_skips(world: World, processes: int, case: str, model: str) -> None:
    run = world(processes) / case
    assert [line["verdict"] for line in lines(run)] == ["applied"] * BAD + [NAN] + ["applied"] * (STEPS - BAD - 1)
    assert skipped(run) == [(BAD, model, NAN)]
    assert json.loads((run / "summary.json").read_text())["skipped"] == 1
    # Only that model's weights were left as they were: Adam has counted the updates of each.
    updates = {name: tensors(run)[f"{name}/optimizer.step.0.bias"].item() for name in ("first", "second")}
    assert updates == {"first": STEPS, "second": STEPS} | {model: STEPS - 1}
    verify_run(run)


@worlds
def test_the_numbers_of_each_model(world: World, processes: int) -> None:
    run = world(processes) / "own-nan"
    loss, norm = ([line[f"train/second_{key}"] for line in lines(run)] for key in ("loss", "grad_norm"))
    for values in (loss, norm):
        assert values[BAD] is None
        assert all(value > 0 for value in values[:BAD] + values[BAD + 1 :])
    assert {(line["train/size"], line["train/second_size"]) for line in lines(run)} == {(2.0, 2.0)}
    # Both models begin with the same weights, and go the same way until one is left as it is.
    assert loss[:BAD] == [line["loss"] for line in lines(run)[:BAD]]
    assert norm[:BAD] == [line["grad_norm"] for line in lines(run)[:BAD]]


@worlds
def test_limits_hold_for_each_model(world: World, processes: int) -> None:
    ends = results(world(processes))["own_loops"]
    assert ends["own-nan"] == ends["own-never"] == ""
    assert ends["own-stop"] == f"step 4 of second was {NAN}, and train.on_nonfinite is stop; skip would go on"
    said = "all steps of second from 4 to {} were skipped, the last one as " + NAN
    assert ends["own-too-many"].startswith(said.format(6))
    # The steps before the checkpoint that it resumed from count too.
    assert ends["own-too-many again"].startswith(said.format(7))
    assert lines(world(processes) / "own-too-many", "events.jsonl")[-1]["event"] == "failed"


def test_ranks_with_different_rates_are_noticed_in_the_next_step(world: World) -> None:
    run = world(2) / "own-rates"
    for rank in (0, 1):
        end = results(world(2), rank)["own_loops"]["own-rates"]
        assert end.startswith(f"step {BAD + 1}: its learning rate was not the same on all ranks, so their weights")
    assert len(lines(run)) == BAD + 2
    assert results(world(1))["own_loops"]["own-rates"] == ""


@worlds
def test_a_model_without_an_update_resumes(world: World, processes: int) -> None:
    """Its optimizer has no state, though the other one's has."""
    folder = world(processes)
    check_same_models(folder / "own-never-resumed", folder / "own-never")
    assert skipped(folder / "own-never-resumed")[-1] == (STEPS - 1, "second", NAN)


@pytest.mark.parametrize("case", WIDE_CASES)
def test_ddp_resumes_with_the_same_bits_on_four_processes(world: World, case: str) -> None:
    check_same_models(world(4) / f"{case}-resumed", world(4) / case)


def check_same_models(resumed: Path, undisturbed: Path) -> None:
    assert [event["step"] for event in lines(resumed, "events.jsonl") if event["event"] == "resumed"] == [EVERY]
    for key in ("step", "loss", "grad_norm", "verdict", "train/second_loss", "train/second_grad_norm"):
        assert [line[key] for line in lines(resumed)] == [line[key] for line in lines(undisturbed)], key
    found, expected = tensors(resumed), tensors(undisturbed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
