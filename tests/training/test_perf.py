"""The time of a step's parts, and its FLOPs."""

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from distrib.config import Config
from distrib.data.source import source
from distrib.plan import RunPlan
from distrib.processes.world import World
from distrib.task import Loss, Task
from distrib.training.step_log import Clock
from distrib.training.timing import flops_per_step

CONFIG = {"task": None, "data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"steps": 1}}


class Products(Task):
    """Has two matrix products and nothing else to count."""

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(torch.ones(16, 3), torch.zeros(16, dtype=torch.long))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False))

    def loss(self, output: Any, batch: Any) -> Loss:
        return Loss(nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(output))


class Looks(Products):
    """Reads the values of its output in forward."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        return output if output.sum().item() > 0 else -output


def counted(task: Products, warnings: list[str]) -> tuple[float | None, nn.Module]:
    config = Config.from_dict(CONFIG)
    plan = RunPlan.create(config, 1, 16)
    module = task.model()
    read = source(task.train_dataset(), plan, World(), 0, {"num_workers": 0})
    return flops_per_step(task, module, read, warnings.append), module


def test_flops_of_a_step() -> None:
    """Two per multiply-add, three times as many with the backward, for eight samples. The module is unchanged."""
    warnings: list[str] = []
    flops, module = counted(Products(), warnings)
    assert not warnings
    assert flops == 3 * 8 * 2 * (3 * 5 + 5 * 7)
    assert not any(parameter.is_meta for parameter in module.parameters())
    assert module[1].num_batches_tracked == 0  # type: ignore[index]


def test_a_forward_that_depends_on_values_is_not_counted() -> None:
    warnings: list[str] = []
    assert counted(Looks(), warnings)[0] is None
    (said,) = warnings
    assert said.startswith("perf/utilisation is not computed, as Task.forward fails on torch's meta device: RuntimeErr")


def test_the_clocks_parts_add_up_to_the_step() -> None:
    clock = Clock()
    clock.start()
    for part in ("data", "forward_backward", "data", "forward_backward", "optimizer"):
        time.sleep(0.01)
        clock.lap(part)
    seconds = clock.seconds()
    assert seconds["data_seconds"] >= 0.02
    assert seconds["optimizer_seconds"] >= 0.01
    assert seconds["seconds"] >= 0.05
    assert seconds["seconds"] - seconds["data_seconds"] - seconds["optimizer_seconds"] == pytest.approx(
        clock._spent["forward_backward"], abs=1e-3
    )
