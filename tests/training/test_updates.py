"""Every kind of optimizer gets the gradient of the window's mean."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset

from distrib import Config, Loss, Task, Trainer

SAMPLES = torch.tensor([[1.0], [2.0], [3.0], [6.0]])


class Looks(AdamW):
    """A subclass of a fused torch optimizer, whose step reads the gradient."""

    def step(self, closure: Any = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


class Wraps:
    """A wrapper, such as lookahead, that takes missing attributes from the inner optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Line(Task):
    """One weight w and the loss w * x. Its gradient is the mean of x, which is 3."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(SAMPLES)

    def model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, output: Tensor, batch: Any) -> Loss:
        return Loss(output.sum(), len(output))

    def optimizer(self, params: list[tuple[str, nn.Parameter]]) -> Any:
        self.made = self.make([p for _, p in params])
        return self.made


def trained(make: Any, folder: Path) -> tuple[Any, float]:
    """Return the optimizer, and the weight after one step."""
    task = Line(make)
    config = {"data": {"global_batch_size": 4, "micro_batch_size": 2}, "train": {"steps": 1}}
    trainer = Trainer(task, Config.from_dict({**config, "tracking": {"wandb": "off"}}), folder)
    trainer.fit()
    return task.made, trainer.module.weight.item()  # type: ignore[union-attr, operator]


def with_hook(params: list[nn.Parameter]) -> Optimizer:
    optimizer: Any = SGD(params, lr=1.0, fused=True)
    optimizer.seen = []
    optimizer.register_step_pre_hook(lambda own, *_: own.seen.extend(p.grad.clone() for p in params))
    return optimizer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SGD(params, lr=1.0, fused=True),
        lambda params: SGD(params, lr=1.0),
        lambda params: Wraps(SGD(params, lr=1.0, fused=True)),
        with_hook,
    ],
    ids=["fused", "not fused", "wrapped", "hooked"],
)
def test_the_update_uses_the_gradient_of_the_mean(make: Any, tmp_path: Path) -> None:
    assert trained(make, tmp_path / "run")[1] == -3.0


@pytest.mark.parametrize(
    "make", [lambda params: Looks(params, lr=1.0, fused=True), with_hook], ids=["derived", "hooked"]
)
def test_optimizers_and_hooks_see_the_gradient_of_the_mean(make: Any, tmp_path: Path) -> None:
    (seen,) = trained(make, tmp_path / "run")[0].seen
    assert seen.item() == 3.0


def test_a_parameter_group_with_rate_0_does_not_change_the_others(tmp_path: Path) -> None:
    def make(params: list[nn.Parameter]) -> Optimizer:
        return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0}, {"params": params, "lr": 1.0}])

    assert trained(make, tmp_path / "run")[1] == -3.0
    assert lines(tmp_path / "run")[0]["lr"] == 1.0
