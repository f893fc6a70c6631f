"""Models that a strategy cannot train are refused before training, in one line that names the parameter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, refused
from torch import nn

from distrib import Config, World
from distrib.errors import ConfigError
from distrib.strategies import registry
from distrib.training.model_checks import check_module

SHARDED = ("zero1", "zero2", "zero3", "fsdp2", "hsdp")
ALL = ("single", "ddp", "zero0", *SHARDED)


def model(name: str = "weight", value: torch.Tensor | None = None, trained: bool = True) -> nn.Module:
    """One ordinary parameter, and one under `name`."""
    module = nn.Module()
    module.register_parameter("first", nn.Parameter(torch.zeros(3)))
    if value is not None:
        module.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    return module


def with_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))


def refused_by(module: nn.Module, blocks: list[nn.Module] | None = None) -> dict[str, str]:
    """Return the strategies that refuse a model, with the message of each."""
    found = {}
    for name in ALL:
        values = {"train": {"steps": 1}, "strategy": {"name": name}}
        if name == "hsdp":
            values["strategy"]["shard_size"] = 2
        config = Config.from_dict(values)
        try:
            check_module(module, registry.create(config, World(world_size=2)), blocks or [])
        except ConfigError as error:
            found[name] = str(error)
            assert "\n" not in found[name]
    return found


@pytest.mark.parametrize(
    ("make", "by", "said"),
    [
        (lambda: model(), (), ""),
        (lambda: model("scale", torch.tensor(1.0)), ("zero3", "fsdp2", "hsdp"), "scale is a scalar"),
        (lambda: model("scale", torch.tensor(1.0), trained=False), ("zero3", "fsdp2", "hsdp"), "give it the shape [1]"),
        (lambda: model("w", torch.zeros(2, 3).t()), (), ""),
        (lambda: model("w", torch.zeros(1).expand(3)), ALL, "w shares memory between its elements"),
        (lambda: model("w", torch.zeros(6)[::2]), ALL, "or has gaps"),
        (lambda: model("w", torch.zeros(2, dtype=torch.cfloat)), ("zero0", *SHARDED), "w is complex64"),
        (lambda: model("w", torch.zeros(2, dtype=torch.int8), trained=False), ("zero3",), "w is int8"),
        (lambda: model().double(), ("zero0", "zero1", "zero2", "zero3"), "first is float64"),
        (lambda: model().bfloat16(), ("zero1", "zero2", "zero3"), "set train.mixed_precision: bf16, or take"),
        (lambda: model().half(), ("zero1", "zero2", "zero3"), "set train.mixed_precision: fp16, or take"),
        (lambda: model("w", torch.zeros(2, dtype=torch.bfloat16)), SHARDED, "w is bfloat16"),
        (lambda: model("w", torch.zeros(2, dtype=torch.bfloat16), trained=False), (), ""),
        (lambda: model("w", torch.zeros(0, 3)), SHARDED, "w has no elements"),
        (lambda: model("w", torch.zeros(0, 3), trained=False), ("zero3",), "w has no elements"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), ALL, "0.weight has no shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), ALL, "weight is on the meta device"),
        (with_embedding, ALL, "0.weight has sparse gradients"),
    ],
)
def test_strategies_that_refuse_a_model(make: Callable[[], nn.Module], by: tuple[str, ...], said: str) -> None:
    found = refused_by(make())
    assert tuple(found) == by
    for line in found.values():
        assert line.startswith("task.model: ")
    assert any(said in line for line in found.values()) or not by


def test_explain_refuses_it_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: {target: tasks:Formats, scalar: true}\ntrain: {steps: 1}\n")
    line = refused(run("distrib", "explain", "c.yaml", "--processes", 2, "strategy.name=fsdp2"))
    assert "is a scalar, which fsdp2 cannot cut; give it the shape [1]" in line


def test_fsdp2_accepts_blocks_of_different_dtypes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64))
    assert "1.weight is float64 and 0.weight float32" in refused_by(module)["fsdp2"]
    assert "fsdp2" not in refused_by(module, [module[0], module[1]])
