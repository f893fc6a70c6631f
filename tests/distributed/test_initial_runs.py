"""Runs that begin with weights from elsewhere, under every strategy: equal to a plain loop, resumed without the source,
and no rank reads more than what it holds."""

import json
import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import initial
import numpy as np
import pytest
import torch
import yaml
from cases import EVERY, INIT, INIT_STEPS
from conftest import Run, check, check_same, lines, losses, ranks, results, start, steps_done, tensors, until
from safetensors.torch import save_file
from tasks import Masked, plain_loss
from torch import Tensor

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]
ROUNDING = 1e-5  # see test_parity
BYTES = sum(4 * value.numel() for value in Masked().model().state_dict().values())


def plain_run(weights: dict[str, Tensor], steps: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Load weights with load_state_dict, and train with a plain loop. Return losses, weights and their average."""
    torch.manual_seed(7)
    model = Masked().model()
    model.load_state_dict(weights, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = []
    for step in range(steps):
        loss = plain_loss(model, Masked().train_dataset(), step, 16, 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        for name, value in model.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * value.detach()
    return found, model.state_dict(), average


@cache
def from_files() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    return plain_run(initial.fitting(), INIT_STEPS)


def from_a_run() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The head begins anew, the rest is what such a run has after EVERY steps."""
    _, weights, _ = plain_run(initial.fitting(), EVERY)
    return plain_run({name: value for name, value in weights.items() if not name.startswith(initial.HEAD)}, INIT_STEPS)


@pytest.mark.parametrize(("processes", "name"), [(count, name) for count in INIT for name in INIT[count]], ids=str)
def test_every_step_equals_the_plain_loops(world: Callable[[int], Path], processes: int, name: str) -> None:
    run = world(processes) / f"init-{name}"
    expected, weights, average = from_a_run() if name.endswith("-run") else from_files()
    np.testing.assert_allclose(losses(run), expected, rtol=ROUNDING)
    found = tensors(run)
    for kind, values in (("model", weights), ("ema", average)):
        for key, value in values.items():
            np.testing.assert_allclose(found[f"{kind}.{key}"], value, rtol=ROUNDING, atol=ROUNDING, err_msg=key)
    assert len(lines(run)) == INIT_STEPS
    recorded = json.loads((run / "environment.json").read_text())["init"]
    assert recorded["left_out"] == ["2.1.weight", "2.1.bias"]
    assert recorded["step"] == (EVERY if name.endswith("-run") else None)


def test_the_cases_differ() -> None:
    """Weights that are not loaded, or the head loaded too, would give other losses."""
    begun = [plain_run(weights, 1)[0][0] for weights in ({}, initial.fitting())]
    assert abs(begun[0] - begun[1]) > 1e-3
    assert abs(from_files()[0][-1] - from_a_run()[0][-1]) > 1e-3


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_resumed_without_the_source(world: Callable[[int], Path], name: str) -> None:
    run = world(2) / f"init-{name}"
    assert not (world(2) / INIT[2][name]).exists()
    check_same(world(2) / f"init-{name}-resumed", run)
    before, after = (
        json.loads((folder / "environment.json").read_text())["init"]
        for folder in (run, world(2) / f"init-{name}-resumed")
    )
    assert after == before


def test_a_rank_reads_what_it_holds(world: Callable[[int], Path]) -> None:
    for processes, share in ((2, {"ddp": 1, "zero2": 1, "zero3": 2, "fsdp2": 2}), (4, {"hsdp": 2})):
        found = [results(world(processes), rank)["bytes_read"] for rank in range(processes)]
        for name, parts in share.items():
            assert all(rank[name][0] == rank[name][1] for rank in found), name
            assert sum(rank[name][0] for rank in found) == BYTES * processes // parts, name


def test_killed_at_a_random_moment(mark: str, run: Run, tmp_path: Path) -> None:
    """Before the first checkpoint, and after it, when the source is gone."""
    config: dict[str, Any] = {
        "name": "undisturbed",
        "seed": 3,
        "task": {"target": "tasks:Slow", "dropout": 0.1},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "train": {"steps": 20, "ema": {}},
        "checkpoint": {"every_steps": 6, "keep": 20},
        "strategy": {"name": "fsdp2"},
        "init": {"from": "source.safetensors"},
    }
    torch.manual_seed(5)
    save_file(Masked().model().state_dict(), tmp_path / "source.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ("launch", "--processes", 2, "config.yaml")
    check(run("distrib", *launch))
    undisturbed, folder = tmp_path / "runs" / "undisturbed", tmp_path / "killed"
    chance = random.Random(4)
    for first, last in ((1, 4), (8, 16)):
        moment = chance.randint(first, last)
        with start(mark, tmp_path, *launch, "--run-dir", folder) as process:
            until(lambda at=moment: steps_done(folder) >= at, f"it does not reach step {moment}")
            ranks(mark)[chance.choice("01")].send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode != 0
    (tmp_path / "source.safetensors").unlink()
    check(run("distrib", *launch, "--run-dir", folder))
    check_same(folder, undisturbed)
