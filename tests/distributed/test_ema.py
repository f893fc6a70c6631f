"""The average of the weights under every strategy, compared with a plain PyTorch loop; killed and resumed."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cases import EMA_OPTIONS, EMA_STEPS, EMAS, EVERY, FEW, SHARDED, SHARDED_WORLDS, emas_of
from conftest import Run, check, check_same, interrupted, lines, losses, ranks, start, steps_done, tensors, until
from tasks import Masked, plain_loss
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distrib.config import EmaConfig

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]
BATCH, LR = 16, 0.5
ROUNDING = 1e-5  # see test_parity


@cache
def plain(name: str) -> tuple[list[float], dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Train with a plain PyTorch loop in one process that averages its weights.

    Return the losses of the steps, the average, and by step the evaluation's loss with the weights and with the
    average. torch's own AveragedModel is stepped beside.
    """
    ema = EmaConfig(**EMAS[name])
    task = Masked()
    data, (others, answers) = task.train_dataset(), task.eval_dataset().tensors
    torch.manual_seed(7)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    parameters = dict(model.named_parameters())
    average = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    beside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema.decay))
    if ema.start_step == 0:
        beside.update_parameters(model)  # its first update copies the weights
    train_losses, evaluated = list[float](), dict[int, tuple[float, float]]()

    def evaluate(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            output = torch.func.functional_call(model, weights, (others,))
        return F.cross_entropy(output.flatten(0, 1), answers.flatten(), ignore_index=-100).item()

    for step in range(EMA_STEPS):
        loss = plain_loss(model, data, step, BATCH, 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train_losses.append(loss.item())
        update = step + 1
        for key, parameter in parameters.items():
            if update <= ema.start_step:
                average[key] = parameter.detach().clone()
            elif (update - ema.start_step) % ema.every_steps == 0:
                average[key] = ema.decay * average[key] + (1 - ema.decay) * parameter.detach()
        if update == ema.start_step or (update > ema.start_step and (update - ema.start_step) % ema.every_steps == 0):
            beside.update_parameters(model)
        if update % EVERY == 0:
            evaluated[update] = evaluate(parameters), evaluate(average)
    for key, value in beside.module.named_parameters():
        torch.testing.assert_close(average[key], value.detach(), rtol=ROUNDING, atol=ROUNDING)
    return train_losses, average, evaluated


def check_average(run: Path, name: str) -> None:
    expected, average, evaluated = plain(name)
    np.testing.assert_allclose(losses(run), expected, rtol=ROUNDING)
    found = tensors(run)
    assert {key for key in found if key.startswith("ema.")} == {f"ema.{key}" for key in average}
    for key, value in average.items():
        np.testing.assert_allclose(found[f"ema.{key}"], value, rtol=ROUNDING, atol=ROUNDING, err_msg=key)
    for line in lines(run, "evals.jsonl"):
        with_weights, with_average = evaluated[line["step"]]
        assert line["metrics"]["eval/loss"] == pytest.approx(with_weights, rel=ROUNDING)
        assert line["metrics"]["eval/ema/loss"] == pytest.approx(with_average, rel=ROUNDING)
        assert {"eval/right", "eval/ema/right"} <= line["metrics"].keys()


@pytest.mark.parametrize("strategy", ["auto", *SHARDED])
@pytest.mark.parametrize("processes", SHARDED_WORLDS)
def test_the_average_is_the_plain_loops(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    for name in emas_of(strategy):
        check_average(world(processes) / f"ema-{name}-{strategy}", name)


@pytest.mark.parametrize("name", ["usual", "late"])
def test_the_average_under_hsdp(world: Callable[[int], Path], name: str) -> None:
    check_average(world(4) / f"ema-{name}-hsdp", name)


@pytest.mark.parametrize("option", EMA_OPTIONS)
def test_the_average_with_options(world: Callable[[int], Path], option: str) -> None:
    check_average(world(2) / f"ema-late-{option}", "late")


@pytest.mark.parametrize(("processes", "strategy"), [(2, "zero3"), (4, "hsdp")], ids=str)
def test_evaluate_takes_the_average(world: Callable[[int], Path], run: Run, processes: int, strategy: str) -> None:
    folder = world(processes) / f"ema-late-{strategy}"
    found = {key: value for key, value in lines(folder, "evals.jsonl")[-1]["metrics"].items() if "/ema/" in key}
    said = check(run("distrib", "evaluate", folder, "--weights", "ema", "--json", "--processes", 2))
    assert json.loads(said.splitlines()[-1])["metrics"] == pytest.approx(found)


def test_the_cases_differ(world: Callable[[int], Path]) -> None:
    """An average that is wrong would be another one."""
    found = {name: tensors(world(1) / f"ema-{name}-auto") for name in EMAS}
    for name in ("usual", "late", "fast"):
        assert np.abs(found[name]["ema.0.weight"] - found[name]["model.0.weight"]).max() > 1e-3
    for key, value in found["none"].items():
        if key.startswith("ema."):
            np.testing.assert_array_equal(value, found["none"][key.replace("ema.", "model.")])
    assert len(lines(world(1) / "ema-late-auto", "evals.jsonl")) == EMA_STEPS // EVERY


@pytest.mark.parametrize(
    ("processes", "strategy"), [(2, "auto"), *((2, name) for name in SHARDED), (4, "hsdp")], ids=str
)
def test_a_skipped_step_changes_no_average(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    """Every step is saved, so the average can be computed again from the weights of the checkpoints."""
    run = world(processes) / f"ema-fp16-{strategy}"
    verdicts = [line["verdict"] for line in lines(run)]
    assert set(verdicts) == {"applied", "skipped:loss_scale"}
    updates, average = 0, dict[str, Any]()
    for step, verdict in enumerate(verdicts, 1):
        saved = tensors(run, step)
        updates += verdict == "applied"
        for key, found in saved.items():
            if key.startswith("ema."):
                weight = saved[key.replace("ema.", "model.", 1)].astype(np.float64)
                if updates <= 1:
                    average[key] = weight
                elif verdict == "applied" and (updates - 1) % 2 == 0:
                    average[key] = 0.8 * average[key] + 0.2 * weight
                np.testing.assert_allclose(found, average[key], rtol=ROUNDING, atol=ROUNDING, err_msg=f"{key} {step}")
    assert updates == FEW - verdicts.count("skipped:loss_scale")


WAYS = [("auto", 2, "zero2", 4), ("zero2", 4, "zero3", 2), ("zero3", 4, "zero1", 1), ("hsdp", 4, "fsdp2", 2)]


@pytest.mark.parametrize(("before", "processes", "after", "on"), WAYS, ids=str)
def test_it_continues_under_another_strategy(
    world: Callable[[int], Path], run: Run, tmp_path: Path, before: str, processes: int, after: str, on: int
) -> None:
    folder = interrupted(world(processes) / f"ema-late-{before}", tmp_path / "run", 2 * EVERY)
    config = folder / "config.yaml"
    overrides = [f"strategy={{name: {after}}}"]
    check(run("distrib", "launch", "--processes", on, config, *overrides, "--run-dir", folder))
    check_average(folder, "late")
    assert {line["world_size"] for line in lines(folder)[2 * EVERY :]} == {on}


@pytest.mark.parametrize("strategy", ["zero2"])
def test_killed_at_a_random_moment(mark: str, run: Run, tmp_path: Path, strategy: str) -> None:
    """Killed twice and resumed on as many processes it has the same bits; on one process, within rounding."""
    config = {
        "name": "undisturbed",
        "seed": 3,
        "task": {"target": "tasks:Slow", "dropout": 0.1},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "train": {"steps": 30, "ema": {"decay": 0.9, "every_steps": 3, "start_step": 4}},
        "eval": {"every_steps": 4},
        "checkpoint": {"every_steps": 3, "keep": 20, "best": {"metric": "eval/ema/loss"}},
        "strategy": {"name": strategy},
    }
    if strategy == "zero3":
        config["strategy"] = {"name": "zero3", "deepspeed": {"zero_optimization": {"reduce_bucket_size": 10**6}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ("launch", "--processes", 2, "config.yaml")
    check(run("distrib", *launch))
    undisturbed, folder = tmp_path / "runs" / "undisturbed", tmp_path / "killed"
    chance = random.Random(strategy)
    for first in (5, 15):
        moment = chance.randint(first, first + 9)
        with start(mark, tmp_path, *launch, "--run-dir", folder) as process:
            until(lambda at=moment: steps_done(folder) >= at, f"it does not reach step {moment}")
            members = ranks(mark)
            for rank in chance.choice([["0"], ["1"], ["0", "1"]]):
                members[rank].send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode != 0
    shutil.copytree(folder, tmp_path / "alone")
    check(run("distrib", *launch, "--run-dir", folder))
    check_same(folder, undisturbed)
    check(run("distrib", "train", "config.yaml", "--run-dir", tmp_path / "alone", "strategy={name: auto}"))
    expected = tensors(undisturbed)
    found = tensors(tmp_path / "alone")
    for key in expected:
        if key.startswith("ema."):
            np.testing.assert_allclose(found[key], expected[key], rtol=ROUNDING, atol=ROUNDING, err_msg=key)
    best = [json.loads((path / "summary.json").read_text())["best"] for path in (folder, undisturbed)]
    assert best[0] == best[1]
    assert best[0]["metric"] == "eval/ema/loss"
