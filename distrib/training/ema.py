"""An exponential moving average (EMA) of the trained parameters, sharded as the optimizer's updates are.

a is the average, w the weights after update u, which counts applied updates from 1. Until `start_step` the average is
the weights themselves. After it, at each `every_steps`-th update, a = a + (1 - decay) (w - a). torch's AveragedModel
with get_ema_multi_avg_fn computes the same. Why it is so: docs/decisions/0026-the-average-is-of-the-shards.md.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrib.config import EmaConfig
from distrib.run_folder import checkpoint
from distrib.run_folder.checkpoint import AVERAGE, Shard
from distrib.strategies.base import Strategy
from distrib.strategies.memory import averaged_dtype


class WeightAverage:
    """The average of what this rank updates of each trained parameter, at least in fp32. Buffers are not averaged."""

    def __init__(self, strategy: Strategy, options: EmaConfig) -> None:
        """`strategy`: has wrapped the model and made an optimizer."""
        self._strategy, self._options = strategy, options
        self._of = strategy.updated_shards()
        self._weights = [shard.tensor.detach() for shard in self._of.values()]
        self._averages = [weight.to(averaged_dtype(weight.dtype), copy=True) for weight in self._weights]
        self._updates: int | Tensor = 0  # applied so far; a tensor if only the device knows
        self._kept: dict[int, Tensor] = {}  # weights that the average's place cannot hold, while it is in use
        alike: dict[Any, list[int]] = defaultdict(list)
        for number, weight in enumerate(self._weights):
            alike[weight.dtype, weight.device].append(number)
        self._groups = [
            ([self._averages[i] for i in numbers], [self._weights[i] for i in numbers]) for numbers in alike.values()
        ]

    @torch.no_grad()
    def update(self, applied: bool | Tensor) -> None:
        """Take the weights after a step into the average. A step that was not applied changes nothing.

        `applied`: a tensor if the result is only known on the device. Then nothing waits for the device.
        """
        start, every, weight = self._options.start_step, self._options.every_steps, 1.0 - self._options.decay
        if isinstance(applied, Tensor):
            updates = self._updates = torch.as_tensor(self._updates, device=applied.device) + applied
            past = updates - start
            due = torch.where(past <= 0, 1.0, torch.where(past % every == 0, weight, 0.0))
            self._move(due * applied)
        elif applied:
            self._updates = int(self._updates) + 1
            after = self._updates - start
            if after <= 0 or after % every == 0:
                self._move(1.0 if after <= 0 else weight)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let forwards in the body use the average in place of the weights. Collective.

        Average and weights change places, one tensor at a time, and afterwards the weights have the bits from before.
        If the body raises, the shards are put back, but the other ranks are not waited for, because they may not come.
        """
        self._swap()
        self._strategy.publish()
        try:
            yield
        except BaseException:
            self._swap()
            raise
        self._swap()
        self._strategy.publish()

    def shards(self) -> dict[str, Shard]:
        """Return what this rank holds of the average, by the checkpoint's names. They are views."""
        pairs = zip(self._of.items(), self._averages, strict=True)
        return {f"{AVERAGE}{name}": replace(shard, tensor=average) for (name, shard), average in pairs}

    def load(self, path: Path, manifest: dict[str, Any], begin: bool = False) -> bool:
        """Continue from a checkpoint, whose weights are loaded. Return whether it has the average.

        Parameters without one begin with their weights; all of them if `begin`.
        """
        self._updates = manifest["applied"]
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)
        there = {} if begin else {key: own for key, own in self.shards().items() if key in manifest["tensors"]}
        checkpoint.load(path, manifest, there)
        return any(key.startswith(AVERAGE) for key in manifest["tensors"])

    def _move(self, weight: float | Tensor) -> None:
        """Move the average towards the weights; for 1 it becomes equal to them, for 0 it stays."""
        for averages, weights in self._groups:
            dtype = averages[0].dtype
            current = weights if weights[0].dtype == dtype else [one.to(dtype) for one in weights]
            if isinstance(weight, Tensor):
                torch._foreach_lerp_(averages, current, [weight.to(dtype)] * len(averages))
            elif weight == 1.0:
                torch._foreach_copy_(averages, current)
            else:
                torch._foreach_lerp_(averages, current, weight)

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange average and weights. A weight of lower precision is kept in a copy, and the average stays."""
        for number, (average, weight) in enumerate(zip(self._averages, self._weights, strict=True)):
            if number in self._kept:
                weight.copy_(self._kept.pop(number))
                continue
            before = weight.clone()
            weight.copy_(average)
            if average.dtype == weight.dtype:
                average.copy_(before)
            else:
                self._kept[number] = before
