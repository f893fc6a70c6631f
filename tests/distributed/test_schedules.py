"""Runs under a schedule with options have the losses of a plain PyTorch loop that steps torch's own schedulers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import SCHEDULED_STEPS, SHARDED, SHARDED_WORLDS
from conftest import lines, losses
from tasks import Masked, plain_loss
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

BATCH, SEED, RATE = 16, 3, 0.5
TOLERANCE = 1e-5  # see test_parity


def torchs_scheduler(name: str, optimizer: Optimizer) -> Any:
    """Return torch's scheduler for cases.SCHEDULED."""
    warmup = torchs.LinearLR(optimizer, 1 / 5, total_iters=4)
    if name == "wsd":
        stable, decay = torchs.ConstantLR(optimizer, 1.0), torchs.LinearLR(optimizer, 1.0, 0.1, 10)
        return torchs.SequentialLR(optimizer, [warmup, stable, decay], [4, 20])
    cosine = torchs.CosineAnnealingLR(optimizer, 10, 0.2 * RATE)
    steps, last = torchs.StepLR(optimizer, 2, 0.7), torchs.LinearLR(optimizer, 0.6, 0.0, 10)
    return torchs.SequentialLR(optimizer, [warmup, cosine, steps, last], [4, 14, 20])


@cache
def plain_loop(name: str) -> tuple[list[float], list[float]]:
    """Return losses and rates of a plain loop in one process. Only the data order is distrib's."""
    task = Masked()
    data = task.train_dataset()
    torch.manual_seed(SEED)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = torchs_scheduler(name, optimizer)
    found, rates = [], []
    for step in range(SCHEDULED_STEPS):
        loss = plain_loss(model, data, step, BATCH, SEED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
        found.append(loss.item())
    return found, rates


@pytest.mark.filterwarnings("ignore")  # SequentialLR steps its parts in a way that torch itself warns of
@pytest.mark.parametrize(
    ("strategy", "name"), [("auto", "wsd"), *((strategy, "pieces") for strategy in ("auto", *SHARDED))]
)
@pytest.mark.parametrize("processes", SHARDED_WORLDS)
def test_a_schedule_equals_torchs_under_every_strategy(
    world: Callable[[int], Path], processes: int, strategy: str, name: str
) -> None:
    run = world(processes) / f"{strategy}-{name}"
    expected, rates = plain_loop(name)
    assert {line["verdict"] for line in lines(run)} == {"applied"}
    assert [line["lr"] for line in lines(run)] == pytest.approx(rates, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(losses(run), expected, rtol=TOLERANCE)
