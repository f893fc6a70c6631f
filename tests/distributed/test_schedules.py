"""Runs under a schedule with options have the losses of a plain PyTorch loop that steps torch's own schedulers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cases import ON, SCHEDULED_STEPS, SHARDED_WORLDS
from conftest import Run, lines, losses, refused
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
    ("processes", "strategy", "name"),
    [*((count, "auto", "wsd") for count in SHARDED_WORLDS), *((*on, "pieces") for on in ON)],
)
def test_a_schedule_equals_torchs_under_every_strategy(
    world: Callable[[int], Path], processes: int, strategy: str, name: str
) -> None:
    run = world(processes) / f"{strategy}-{name}"
    expected, rates = plain_loop(name)
    assert {line["verdict"] for line in lines(run)} == {"applied"}
    assert [line["lr"] for line in lines(run)] == pytest.approx(rates, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(losses(run), expected, rtol=TOLERANCE)


def test_a_rate_that_depends_on_the_rank(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os\n\nimport tasks\n\n\nclass Own(tasks.Masked):\n"
        "    def learning_rate(self, update, num_updates):\n"
        "        return 0.1 + int(os.environ['RANK']) * (update > 2)\n"
    )
    config = {"task": {"target": "own:Own"}, "data": {"global_batch_size": 4, "micro_batch_size": 2}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**config, "train": {"steps": 5}}))
    line = refused(run("distrib", "launch", "--processes", 2, "own.yaml"))
    assert "task.learning_rate: returned 0.1 for update 3 on rank 0 of 2 on " in line
    assert ", and 1.1 on rank 1 of 2 on " in line
    assert line.endswith("; return a function of update and num_updates alone")
