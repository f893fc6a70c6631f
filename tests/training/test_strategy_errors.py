"""Errors that a strategy causes become one line; others are unchanged."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import Masked
from torch import nn

from distrib import Config, Trainer, World
from distrib.errors import ConfigError
from distrib.strategies import registry
from distrib.strategies.base import Strategy
from distrib.strategies.errors import explain


def strategy(name: str, module: nn.Module) -> Strategy:
    """Which is not wrapped: for that some need a second process."""
    config = Config.from_dict({"train": {"steps": 1}, "strategy": {"name": name}})
    strategy = registry.create(config, World())
    strategy.module = strategy.model = module
    return strategy


class Wrapper(nn.Module):
    pass


def test_attributes_hidden_by_a_wrapper_are_explained() -> None:
    module = nn.Linear(2, 2)
    wrapped = strategy("ddp", module)
    wrapped.model = Wrapper()
    said = r"task: reads model.in_features, but ddp reduces .* in the model's forward"
    with pytest.raises(AttributeError) as hidden:
        _ = wrapped.model.in_features
    assert re.search(said, explain(hidden.value, wrapped) or "")
    for obj in (wrapped.model, module):  # the wrapper, and the module itself
        with pytest.raises(AttributeError) as missing:
            _ = obj.nothing
        assert explain(missing.value, wrapped) is None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("zero3", "The size of tensor a (2) must match the size of tensor b (0) at dimension 1", "has not gathered"),
        ("fsdp2", "aten.mm got mixed torch.Tensor and DTensor, need to convert", "has not gathered"),
        ("zero1", "Loss scaling is required for this configuration", "takes a gradient of the model's output"),
        ("ddp", "Expected to have finished reduction in the prior iteration", "set strategy.find_unused_parameters"),
        ("zero2", "The size of tensor a (2) must match the size of tensor b (0) at dimension 1", None),
        ("zero3", "The size at 0x7f must match the size of tensor b (10) at dimension 1", None),
    ],
)
def test_errors_of_libraries_are_recognised(name: str, text: str, said: str | None) -> None:
    explained = explain(RuntimeError(text), strategy(name, nn.Linear(2, 2)))
    assert explained is None if said is None else said in (explained or "")


def test_a_gradient_in_evaluation_is_explained(tmp_path: Path) -> None:
    class Force(Masked):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            output = super().forward(model, batch)
            torch.autograd.grad(output.sum(), list(model.parameters()), retain_graph=True)
            return output

    config = Config.from_dict({"data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"steps": 1}})
    with pytest.raises(ConfigError, match=r"takes a gradient in evaluation, which runs under torch.no_grad\(\); write"):
        Trainer(Force(), config, tmp_path / "run").fit()
