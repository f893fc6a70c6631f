"""The loss of every step equals that of a plain PyTorch loop, whatever the number of processes and the window."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, check
from tasks import Masked
from torch.nn import functional as F

from distrib.data.order import sample_indices

STEPS, MICRO = 100, 4
WORLDS = (1, 2, 3, 4)
WINDOWS = {"sgd": range(1, 7), "adamw": (3,)}  # micro-batches a step, on each rank
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.5},  # Adam would hide a wrong scale of the gradient
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 10},
}
CLIP = {"sgd": None, "adamw": 0.5}


def config(optimizer: str, batch: int, micro: int = MICRO, **task: float) -> dict[str, Any]:
    return {
        "seed": 7,
        "task": {"target": "tasks:Masked", **task},
        "data": {"global_batch_size": batch, "micro_batch_size": micro},
        "optim": OPTIMIZERS[optimizer],
        "train": {"steps": STEPS, "max_grad_norm": CLIP[optimizer]},
    }


def plain_losses(optimizer: str, batch: int) -> list[float]:
    """A PyTorch loop in one process that takes the whole global batch at once: no distrib but the data order."""
    task = Masked()
    tokens, targets = task.train_dataset().tensors
    torch.manual_seed(7)
    model = task.model()
    if optimizer == "sgd":
        update = torch.optim.SGD(model.parameters(), lr=0.5)
    else:
        update = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        positions = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
        chosen = sample_indices(positions, len(tokens), 7).tolist()
        loss = F.cross_entropy(model(tokens[chosen]).flatten(0, 1), targets[chosen].flatten(), ignore_index=-100)
        update.zero_grad()
        loss.backward()
        if optimizer == "adamw":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            warm, done = (step + 1) / 11, (step - 10) / 90
            update.param_groups[0]["lr"] = 0.01 * (warm if step < 10 else 0.5 * (1 + np.cos(np.pi * done)))
        update.step()
        losses.append(loss.item())
    return losses


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(module_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with the runs of so many processes, trained when first asked for."""

    @cache
    def train(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"parity-{world}-")
        cases = [
            {"run": f"{optimizer}-{window}", "config": config(optimizer, world * window * MICRO)}
            for optimizer in OPTIMIZERS
            for window in WINDOWS[optimizer]
        ]
        if world != 3:
            cases.append({"run": "dropout", "config": config("sgd", 16, dropout=0.3)})
        (folder / "cases.json").write_text(json.dumps(cases))
        script = ROOT / "tests/distributed/cases.py"
        check(module_run("distrib", "launch", "--processes", world, script, folder, timeout=170))
        return folder

    return train


# fp32 sums of a few hundred terms in another order differ by some 1e-7 of their value; a hundred steps of feedback
# leave less than the 1e-5 that this project promises.
TOLERANCE = 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_every_step_equals_the_plain_loops(trained: Callable[[int], Path], world: int) -> None:
    folder = trained(world)
    for optimizer in OPTIMIZERS:
        for window in WINDOWS[optimizer]:
            batch = world * window * MICRO
            lines = ledger(folder / f"{optimizer}-{window}")
            expected = plain_losses(optimizer, batch)
            assert [line["step"] for line in lines] == list(range(STEPS))
            assert {line["verdict"] for line in lines} == {"applied"}
            assert expected[-1] < expected[0]
            np.testing.assert_allclose([line["loss"] for line in lines], expected, rtol=TOLERANCE)


def test_dropout_trains_the_same_on_any_number_of_processes(trained: Callable[[int], Path]) -> None:
    alone, *others = (ledger(trained(world) / "dropout") for world in (1, 2, 4))
    for other in others:
        np.testing.assert_allclose([line["loss"] for line in other], [line["loss"] for line in alone], rtol=TOLERANCE)
        for key in ("count", "samples", "lr", "epoch"):
            assert [line[key] for line in other] == [line[key] for line in alone]
    plain = plain_losses("sgd", 16)
    assert abs(alone[0]["loss"] - plain[0]) > 1e-3  # dropout really dropped
