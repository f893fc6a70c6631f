"""Loops of one's own with two models, which the ranks of each world run. test_several_models checks them."""

import math
from pathlib import Path
from typing import Any

import torch
from conftest import interrupted
from torch import nn
from torch.utils.data import TensorDataset

from distrib import Config, Loss, OwnLoop, World
from distrib.errors import ConfigError, TrainingError

STEPS, EVERY, BAD, WIDE = 8, 2, 3, 300
WIDE_CASES: dict[str, dict[str, Any]] = {
    "own-wide": {"width": WIDE},
    "own-compressed": {"width": WIDE, "compressed": True},
}
CASES: dict[str, dict[str, Any]] = {  # what `_run` takes: in which steps the second model's loss is NaN, and more
    "own-nan": {"bad": (BAD, BAD + 1)},
    "own-bitwise-nan": {"bad": (BAD, BAD + 1), "determinism": "bitwise"},
    "own-first-nan": {"bad": (BAD, BAD + 1), "model": "first"},
    "own-stop": {"bad": (BAD, BAD + 1), "on_nonfinite": "stop"},
    "own-too-many": {"bad": (BAD, STEPS), "max_skipped": 3},
    "own-never": {"bad": (0, STEPS)},
    "own-rates": {"other_rate_in": BAD},
}


def run_own_loops(folder: Path, world: World) -> dict[str, str]:
    """Run the cases, and resume some. Return how those ended that failed, by name."""
    if world.world_size == 4:
        return _run_and_resume(folder, world, WIDE_CASES)
    ends = {name: _run(folder / name, **values) for name, values in CASES.items() if name != "own-never"}
    ends |= _run_and_resume(folder, world, {"own-never": CASES["own-never"]})
    # It resumes from a checkpoint before its end, and counts the steps that were skipped before that too.
    ends["own-too-many again"] = _run(folder / "own-too-many", **{**CASES["own-too-many"], "max_skipped": 4})
    return ends


def _run_and_resume(folder: Path, world: World, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    ends = {}
    for name, values in cases.items():
        ends[name] = _run(folder / name, **values)
        copy = folder / f"{name}-resumed"
        if world.is_rank_0:
            interrupted(folder / name, copy, after=EVERY)
        world.barrier()
        ends[copy.name] = _run(copy, **values)
    return ends


def _run(
    path: Path,
    bad: tuple[int, int] = (0, 0),
    model: str = "second",
    width: int = 8,
    compressed: bool = False,
    other_rate_in: int | None = None,
    **train: Any,
) -> str:
    """Run a loop. Return the error that ended it, or nothing."""
    config = Config.from_dict(
        {
            "data": {"global_batch_size": 8, "micro_batch_size": 2},
            "optim": {"name": "adamw"},
            "train": {"steps": STEPS, **train},
            "strategy": {"communication_dtype": "bf16" if compressed else "fp32"},
            "checkpoint": {"every_steps": EVERY, "keep": 9},
        }
    )
    torch.manual_seed(1)
    inputs = torch.randn(40, 4)
    models = {name: _model(width) for name in ("first", "second")}
    try:
        with OwnLoop(config, TensorDataset(inputs, inputs.sum(1, keepdim=True)), models, path) as loop:
            last = loop.world.rank == loop.world.world_size - 1
            for window in loop:
                for index, batch in enumerate(window):
                    for name, engine in loop.engines.items():
                        with engine.microbatch(window, index):
                            given, wanted = engine.to_device(batch)
                            total = (engine.model(given) - wanted).square().sum()
                            if last and index == 1 and name == model and window.step in range(*bad):
                                total = total * math.nan
                            if index == 0:
                                engine.zero_grad()
                            engine.backward(Loss(total, len(given), {"size": (len(given), 1)}))
                rate = 0.011 if last and window.step == other_rate_in else 0.01
                first, second = (engine.step(lr=rate) for engine in loop.engines.values())
                loop.record(first, second=second)
    except (TrainingError, ConfigError) as error:
        return str(error)
    return ""


def _model(width: int) -> nn.Module:
    """Return a model, with the same weights each time.

    If it is wide, DDP's first buckets differ from those that it builds after a backward.
    """
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        *(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
    )
