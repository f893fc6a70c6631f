"""What a micro-batch, a backward and an update mean on many processes and in mixed precision."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from distrib.data.loader import DevicePrefetcher, Window
from distrib.data.order import derive_seed
from distrib.run_folder.checkpoint import named_state
from distrib.strategies.base import DTYPES, Strategy
from distrib.strategies.errors import recognised
from distrib.strategies.step_sums import StepSums
from distrib.task import Loss, Task
from distrib.training.buffers import Buffers
from distrib.training.pending_step import PendingStep
from distrib.training.task_checks import check_loss
from distrib.training.timing import Clock

_FIRST_SCALE_OF_A_MEAN = 2.0**16  # GradScaler's
_UPDATES_TO_GROW = 2000
_LEAST_SCALE = 2.0**-24  # fp16's smallest number: with less, a gradient of 1 would be 0
_WITHOUT_STREAMS = ("cpu", "mps")


class LossScale:
    """By which an fp16 loss is multiplied before its backward, as torch's GradScaler: halved where the gradient
    overflowed, doubled after 2,000 updates in a row.

    GradScaler itself unscales gradients where they lie and asks each rank alone, which fits none of the sharded
    strategies.
    """

    def __init__(self, value: float, updates: int = 0) -> None:
        self.value = value
        self.updates = updates  # since it last changed

    def update(self, overflowed: bool) -> None:
        self.updates = 0 if overflowed else self.updates + 1
        if overflowed:
            self.value = max(self.value / 2, _LEAST_SCALE)
        elif self.updates == _UPDATES_TO_GROW:
            self.value, self.updates = self.value * 2, 0


class Engine:
    """What all strategies share: precision, random numbers, normalisation, the verdict. Where things lie, and how
    gradients meet, is the `strategy`'s."""

    def __init__(
        self,
        strategy: Strategy,
        *,
        mixed_precision: str = "no",
        max_grad_norm: float | None = None,
        seed: int = 0,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`warn`: tells the user once of what forward does with buffers."""
        self.strategy = strategy
        self.world = strategy.world
        self.module = strategy.module  # the user's own
        self.model = strategy.model
        self.device = self.world.device
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.mixed_precision = mixed_precision
        self.dtype = DTYPES.get(mixed_precision)
        groups = strategy.optimizer.param_groups if strategy.optimizer is not None else []
        # The rate that the ledger shows: the first group's, or of the first group that has one. All others keep their
        # ratio to it, so that each is its own rate times the schedule's factor.
        self.base_rate = next((float(group["lr"]) for group in groups if group["lr"]), 0.0)
        self._rate_ratios = [group["lr"] / (self.base_rate or 1.0) for group in groups]
        self.loss_scale: LossScale | None = None  # fp16 only, made when the first count is known
        # On a CPU there is nobody to wait for, and Python's numbers are cheaper than tensors; Metal has no streams.
        # fp16 has to know whether a gradient overflowed before it can scale the next loss.
        self.waits = self.device.type in _WITHOUT_STREAMS or mixed_precision == "fp16"
        self._generators = [torch.default_generator.manual_seed]
        if self.device.type != "cpu":  # not run here: see docs/not-run-here.md
            self._generators.append(torch.get_device_module(self.device).manual_seed)
        self.buffers = Buffers(self.world, self.module, warn)
        self.clock = Clock()
        self.stop_asked = False  # of this rank; the others learn of it by the step's result
        self._window: Window | None = None
        self._index = 0  # of the micro-batch in the window
        self._last = False

    @property
    def prefetcher(self) -> DevicePrefetcher | None:
        """To have batches copied before they are needed, where there is something to copy them to."""
        return None if self.device.type in _WITHOUT_STREAMS else DevicePrefetcher(self.device, self.to_device)

    def to_device(self, batch: Any) -> Any:
        """Move a nested batch to this rank's device, without waiting for the copy; one that is there stays there."""
        return batch if self.device.type == "cpu" else send_to_device(batch, self.device, non_blocking=True)

    @contextmanager
    def microbatch(self, window: Window, index: int) -> Iterator[None]:
        """Random numbers that belong to this micro-batch, autocast, and no synchronisation before the last."""
        self.clock.lap("data")
        self._window, self._index, self._last = window, index, index == len(window) - 1
        if index == 0:
            self.buffers.begin()
        else:
            self.buffers.next()
        self.seed_random(derive_seed(self.seed, window.step, window.first + index))
        with self.strategy.accumulate(self._last), self.autocast():
            yield
        self.clock.lap("forward_backward")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Of forward and loss, in training and in evaluation. An error that the strategy causes becomes one line."""
        precision = nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
        with recognised(self.strategy), precision:
            yield

    def seed_random(self, seed: int) -> None:
        """Seed Python's, numpy's and torch's generators of the CPU and of this device.

        torch.manual_seed takes 100 times as long.
        """
        for manual_seed in self._generators:
            manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def zero_grad(self) -> None:
        """Once a window, before its first backward."""
        self.strategy.zero_grad()

    def backward(self, loss: Loss) -> None:
        """Add the gradient of `loss.total`; on the window's last micro-batch, sum over the ranks."""
        assert self._window is not None, "backward belongs into engine.microbatch"
        loss = check_loss(loss, for_training=True)
        if self.mixed_precision == "fp16" and self.loss_scale is None:
            self.loss_scale = self._first_loss_scale(loss, self._window)
        stop = self._last and self.stop_asked
        sums = StepSums.pack(loss, self._window.digest if self._last else 0, stop)
        number = self._window.first + self._index
        self.buffers.take(number, len(self._window) * self.world.world_size, self._last)
        total = loss.total if self.loss_scale is None else loss.total * self.loss_scale.value
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, enabled=False):
            self.strategy.backward(total, sums, self._last)

    def step(self, lr: float) -> PendingStep:
        """Normalise by the window's count, clip, update. All ranks see the same numbers, so all decide alike.

        `lr` is the rate of the first parameter group whose rate is not 0; the others keep their ratio to it.
        """
        optimizer = self.strategy.optimizer
        assert optimizer is not None, "this engine only evaluates"
        for group, ratio in zip(optimizer.param_groups, self._rate_ratios, strict=True):
            group["lr"] = lr * ratio
        waits = self.waits or not self.strategy.can_update_on_device
        step = (self._update_on_host if waits else self._update_on_device)(self.strategy.sums.result(), lr)
        self.clock.lap("optimizer")
        return step

    def state(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps besides the shards."""
        scale = self.loss_scale
        _, tied = named_state(self.module)
        return {
            "loss_scale": None if scale is None else {"value": scale.value, "updates": scale.updates},
            "numbers": self.strategy.numbers(),
            "tied": tied,
        }

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        """Go on from a checkpoint, with the optimizer's state as new if asked. Raises MismatchError if it is of another
        model or optimizer."""
        self.strategy.load(path, manifest, reset_optimizer)
        if (scale := manifest["loss_scale"]) is not None and self.mixed_precision == "fp16":
            self.loss_scale = LossScale(scale["value"], scale["updates"])

    def warm_up_ddp_buckets(self, task: Task, window: Window) -> None:
        """Where a run goes on: one forward and backward that leave no trace but in DDP, before the first window.

        DDP lays out its buckets anew after its first backward. Without this the first step of a resumed run would be
        reduced in the layout of a fresh one, and rounded otherwise than in a run that was never interrupted (seen on
        4 processes).
        """
        self._window, self._index, self._last = window, 0, True
        self.buffers.begin()
        with self.strategy.accumulate(last=True), self.autocast():
            batch = self.to_device(next(iter(window)))
            self.backward(task.loss(task.forward(self.model, batch), batch))
        self.strategy.sums.result()
        self.strategy.zero_grad()
        self.buffers.finish(applied=False)

    def _update_on_host(self, sums_there: Tensor, lr: float) -> PendingStep:
        """Waits for the device and the ranks, and then decides."""
        sums, scale, grad_norm = sums_there.tolist(), self.loss_scale, math.nan
        self.clock.lap("forward_backward")
        value = None if scale is None else scale.value
        known = StepSums.unpack(sums)
        if known.count and math.isfinite(known.loss):
            grad_norm = self.strategy.update(1.0 / known.count / (value or 1.0), self.max_grad_norm)
            if scale is not None:
                scale.update(overflowed=not math.isfinite(grad_norm))
        else:
            self.strategy.discard()
        self.buffers.finish(applied=math.isfinite(grad_norm))
        return PendingStep(sums, grad_norm, lr, value)

    def _update_on_device(self, sums: Tensor, lr: float) -> PendingStep:
        """Leaves it to the device to decide: the same arithmetic, on numbers that are not there yet."""
        self.clock.lap("forward_backward")
        grad_norm = self.strategy.update(StepSums.factor(sums), self.max_grad_norm)
        self.buffers.finish(applied=grad_norm.isfinite())
        return PendingStep(sums.clone(), grad_norm, lr, None)

    def _first_loss_scale(self, loss: Loss, window: Window) -> LossScale:
        """torch's usual first scale is meant for a mean; ours is of a sum, so divide it by the likely count.

        Micro-batch 0 of the step is rank 0's whatever the number of processes, so all worlds begin alike.
        """
        count = self.world.on_rank_0(lambda: max(1, int(loss.count)))
        halvings = round(math.log2(count * len(window) * self.world.world_size))
        return LossScale(_FIRST_SCALE_OF_A_MEAN / 2**halvings)
