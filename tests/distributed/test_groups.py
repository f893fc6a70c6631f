"""`optim.groups`: parameters by their names, with other values or classes, or frozen, as in a plain PyTorch loop."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CUT, EVERY, FEW, GROUPED, SHARDED, SHARDED_WORLDS, UNFREEZE_AT, UNFROZEN
from conftest import events, losses, tensors
from tasks import Masked, plain_loss

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]
BATCH, SEED = 16, 3
TOLERANCE = 1e-5  # see test_parity


@cache
def plain_loop(groups: str) -> list[float]:
    """Return the losses of a plain loop in one process. Only the data order is distrib's."""
    task = Masked()
    data = task.train_dataset()
    torch.manual_seed(SEED)
    model = task.model()
    named = dict(model.named_parameters())
    optimizers: list[Any]
    if groups == "muon":
        matrices = [named.pop(name) for name in ("1.0.weight", "2.1.weight")]
        optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)]
        rest: list[Any] = [{"params": list(named.values())}]
    elif groups == "adafactor":
        own = [named.pop(name) for name in list(named) if name[0] in "12"]
        optimizers = [torch.optim.Adafactor(own, lr=0.1, weight_decay=0.1)]
        rest = [{"params": list(named.values())}]
    else:
        named.pop("2.0.weight").requires_grad_(False)
        biases = [named.pop(name) for name in ("1.0.bias", "2.0.bias", "2.1.bias")]
        optimizers = [torch.optim.SGD(biases, lr=0.5, momentum=0.9, weight_decay=0.01)]
        rest = [{"params": [named.pop("0.weight")], "lr": 0.02, "weight_decay": 0.0}, {"params": list(named.values())}]
    optimizers.append(torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99)))
    found = []
    for step in range(FEW):
        loss = plain_loss(model, data, step, BATCH, SEED)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("processes", "strategy", "groups"),
    [(count, *pair) for count in SHARDED_WORLDS for pair in GROUPED if count == 2 or pair[0] == "auto"],
)
def test_groups_equal_a_plain_loop(world: Callable[[int], Path], processes: int, strategy: str, groups: str) -> None:
    np.testing.assert_allclose(losses(world(processes) / f"{strategy}-{groups}"), plain_loop(groups), rtol=TOLERANCE)


def test_hsdp_and_bitwise(world: Callable[[int], Path]) -> None:
    np.testing.assert_allclose(losses(world(4) / "hsdp-classes"), plain_loop("classes"), rtol=TOLERANCE)
    alone = losses(world(1) / "bitwise-muon")
    np.testing.assert_allclose(alone, plain_loop("muon"), rtol=TOLERANCE)
    assert [losses(world(count) / "bitwise-muon") for count in (2, 4)] == [alone, alone]


@pytest.mark.parametrize("strategy", CUT)
@pytest.mark.parametrize("groups", ["muon", "adafactor"])
def test_owners_update_whole_matrices(world: Callable[[int], Path], strategy: str, groups: str) -> None:
    run, whole = world(2) / f"{strategy}-{groups}", world(2) / f"auto-{groups}"
    np.testing.assert_allclose(losses(run), plain_loop(groups), rtol=TOLERANCE)
    assert {name: value.shape for name, value in tensors(run).items()} == {
        name: value.shape for name, value in tensors(whole).items()
    }


@pytest.mark.parametrize("strategy", CUT)
def test_a_class_that_distrib_does_not_know_gets_whole_tensors(world: Callable[[int], Path], strategy: str) -> None:
    run, whole = world(2) / f"{strategy}-lars", world(2) / "auto-lars"
    np.testing.assert_allclose(losses(run), losses(whole), rtol=TOLERANCE)
    numbers = [
        json.loads((max((one / "checkpoints").iterdir()) / "manifest.json").read_text())["numbers"]
        for one in (run, whole)
    ]
    assert numbers[0] == numbers[1]  # each owner has counted those of its own tensors
    assert set(numbers[0].values()) == {FEW}


def test_owners_on_four_processes_and_on_one(world: Callable[[int], Path]) -> None:
    for groups in ("muon", "adafactor"):
        np.testing.assert_allclose(losses(world(4) / f"hsdp-{groups}"), plain_loop(groups), rtol=TOLERANCE)
    np.testing.assert_allclose(losses(world(1) / "zero2-muon"), plain_loop("muon"), rtol=TOLERANCE)


def test_several_classes_whose_gradients_are_on_the_cpu(world: Callable[[int], Path]) -> None:
    """DeepSpeed then has the gradients of all groups at once, and updates one group after the other."""
    np.testing.assert_allclose(losses(world(2) / "zero1-offload-classes"), plain_loop("classes"), rtol=TOLERANCE)


@cache
def plain_loop_that_unfreezes() -> list[float]:
    """The schedules are written out; parameters that are frozen at first get an optimizer of their own later."""
    task = Masked()
    data = task.train_dataset()
    torch.manual_seed(3)
    model = task.model()
    late = {name for name, _ in model.named_parameters() if name.startswith(("1.", "2.0."))}
    optimizers: list[torch.optim.Optimizer] = []
    found = []
    for step in range(FEW):
        if step in (0, UNFREEZE_AT):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in late or step > 0)
            begun = [
                (name, p) for name, p in model.named_parameters() if p.requires_grad and (name in late) == (step > 0)
            ]
            biases = [p for name, p in begun if name.endswith("bias")]
            others = [p for name, p in begun if not name.endswith("bias")]
            optimizers.append(torch.optim.AdamW([{"params": biases}, {"params": others}], weight_decay=0.0))
        rising, past = (step + 1) / 4, (step - 3) / (FEW - 3)
        rates = (0.1 * (rising if step < 3 else 0.5 * (1 + math.cos(math.pi * past))), 0.01 * min(rising, 1 - past))
        loss = plain_loss(model, data, step, BATCH, SEED)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (4, "auto"), *((2, name) for name in UNFROZEN)])
def test_unfreezing_and_schedules_of_groups_equal_a_plain_loop(
    world: Callable[[int], Path], processes: int, strategy: str
) -> None:
    run = world(processes) / f"{strategy}-unfrozen"
    np.testing.assert_allclose(losses(run), plain_loop_that_unfreezes(), rtol=TOLERANCE)
    before, after = tensors(run, EVERY), tensors(run)
    assert "optimizer.exp_avg.1.0.weight" not in before
    assert after["optimizer.step.1.0.weight"] == FEW - UNFREEZE_AT
    assert after["optimizer.step.0.weight"] == FEW
    assert events(run).count("unfrozen") == 1
    assert "resumed" not in events(run)


@pytest.mark.parametrize("strategy", ["auto", *SHARDED])
def test_a_frozen_parameter_has_no_state_and_stays(world: Callable[[int], Path], strategy: str) -> None:
    run = world(2) / f"{strategy}-classes"
    first, last = tensors(run, EVERY), tensors(run)
    np.testing.assert_array_equal(first["model.2.0.weight"], np.ones(32))
    np.testing.assert_array_equal(last["model.2.0.weight"], np.ones(32))
    assert not any(name.startswith("optimizer.") and name.endswith("2.0.weight") for name in last)
    assert "optimizer.momentum_buffer.1.0.bias" in last
    assert "optimizer.exp_avg.1.0.weight" in last
    assert "optimizer.exp_avg.1.0.bias" not in last
