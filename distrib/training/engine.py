"""The engine of a training step: seeding, autocast, gradient normalisation and clipping, and the fp16 loss scale."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from distrib.config import EmaConfig
from distrib.data.loader import DevicePrefetcher, Window, seed_generators
from distrib.data.order import derive_seed
from distrib.errors import ConfigError
from distrib.optim_groups import REST
from distrib.run_folder.checkpoint import Shard, named_state
from distrib.strategies.base import DTYPES, Strategy
from distrib.strategies.errors import explain
from distrib.strategies.step_sums import StepSums, mark_of
from distrib.task import Loss, Task
from distrib.training.buffers import Buffers
from distrib.training.ema import WeightAverage
from distrib.training.own_sums import OwnSums
from distrib.training.step_log import Clock, PendingStep
from distrib.training.task_checks import check_loss

_FIRST_SCALE_OF_A_MEAN = 2.0**16  # as in torch.amp.GradScaler
_UPDATES_TO_GROW = 2000  # as in torch.amp.GradScaler
_LEAST_SCALE = 2.0**-24  # fp16's smallest number; a smaller scale would make a gradient of 1 zero
_WITHOUT_STREAMS = ("cpu", "mps")


class LossScale:
    """The factor by which an fp16 loss is multiplied before its backward.

    As in torch's GradScaler, it is halved if a gradient overflows, and doubled after 2,000 updates in a row. GradScaler
    itself does not fit sharded strategies, because it unscales gradients in place and decides on each rank alone.
    """

    def __init__(self, value: float, updates: int = 0) -> None:
        self.value = value
        self.updates = updates  # since the scale last changed

    def update(self, overflowed: bool) -> None:
        self.updates = 0 if overflowed else self.updates + 1
        if overflowed:
            self.value = max(self.value / 2, _LEAST_SCALE)
        elif self.updates == _UPDATES_TO_GROW:
            self.value, self.updates = self.value * 2, 0


class Engine:
    """What is the same under all strategies: precision, random numbers, normalisation and the result of a step.

    The strategy decides how the model is sharded and how gradients are reduced.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        mixed_precision: str = "no",
        max_grad_norm: float | None = None,
        seed: int = 0,
        ema: EmaConfig | None = None,
        own_schedules: Collection[int] = (),
        warn: Callable[[str], None] = lambda _: None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`ema`: how to average the weights; None: no average is kept.
        `own_schedules`: the places of those of `optim.groups` that have a schedule of their own.
        `warn`: called with a message, once for each buffer that forward changes in a way that is lost.
        `asked_to_stop`: whether this rank was; the others learn of it with the step's sums."""
        self.strategy = strategy
        self.world = strategy.world
        self.module = strategy.module  # the user's
        self.model = strategy.model  # as the strategy wraps it
        self.device = self.world.device
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.mixed_precision = mixed_precision
        self.dtype = DTYPES.get(mixed_precision)
        groups = strategy.optimizer.param_groups if strategy.optimizer is not None else []
        # The ledger shows the rate of the first group whose rate is not 0 and that has no schedule of its own. The
        # others keep their ratio to it, so that each group's rate is its own base rate times the schedule's factor.
        usual = [group for group in groups if group.get("place") not in own_schedules]
        self.base_rate = next((float(group["lr"]) for group in [*usual, *groups] if group["lr"]), 0.0)
        self._base_rates = [float(group["lr"]) for group in groups]
        self.own_factors: dict[int, float] = {}  # of the next step, for groups with a schedule of their own, by place
        self.loss_scale: LossScale | None = None  # fp16 only; made in the first backward, which knows the count
        # Whether a step waits for its result. A CPU computes synchronously, and Python's numbers are cheaper than
        # tensors; Metal has no streams; fp16 must know whether a gradient overflowed before it scales the next loss.
        self.waits = self.device.type in _WITHOUT_STREAMS or mixed_precision == "fp16"
        self._seed_device: Callable[[int], object] | None = None
        if self.device.type != "cpu":  # not run here: see docs/not-run-here.md
            self._seed_device = torch.get_device_module(self.device).manual_seed
        self.buffers, self.warn = Buffers(self.world, self.module, warn), warn
        self.average = None if ema is None else WeightAverage(strategy, ema)
        self.clock = Clock()
        self.asked_to_stop = asked_to_stop
        self._own_sums: OwnSums | None = None  # made in the first backward, which knows their names
        self._window: Window | None = None
        self._index = 0  # of the micro-batch in the window
        self._last = False
        self._mark = 0  # of the last step's rate, which the ranks compare with the next step's sums

    @property
    def prefetcher(self) -> DevicePrefetcher | None:
        """A prefetcher that copies batches to the device; None on devices without streams."""
        return None if self.device.type in _WITHOUT_STREAMS else DevicePrefetcher(self.device, self.to_device)

    def to_device(self, batch: Any) -> Any:
        """Move a nested batch to this rank's device, without waiting for the copy."""
        return batch if self.device.type == "cpu" else send_to_device(batch, self.device, non_blocking=True)

    @contextmanager
    def microbatch(self, window: Window, index: int) -> Iterator[None]:
        """Seed the generators for this micro-batch, run the body under autocast, and reduce gradients only if it is
        the window's last."""
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
        """Run forward and loss in the mixed precision. An error that the strategy causes becomes a ConfigError."""
        try:
            with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
                yield
        except Exception as error:
            if (reason := explain(error, self.strategy)) is None:
                raise
            raise ConfigError(reason) from error

    def seed_random(self, seed: int) -> None:
        """Seed the generators of Python, numpy and torch, for the CPU and this device.

        This takes a hundredth of the time of torch.manual_seed, which goes through all devices.
        """
        seed_generators(seed)
        if self._seed_device is not None:
            self._seed_device(seed)

    def zero_grad(self) -> None:
        """Clear the gradients. Call it once per window, before its first backward."""
        self.strategy.zero_grad()

    def backward(self, loss: Loss) -> None:
        """Add the gradient of `loss.total`. On the window's last micro-batch, also sum the gradients over the ranks."""
        assert self._window is not None, "backward belongs into engine.microbatch"
        loss = check_loss(loss, for_training=True)
        if self.mixed_precision == "fp16" and self.loss_scale is None:
            self.loss_scale = self._first_loss_scale(loss, self._window)
        own = loss.sums or {}
        if self._own_sums is None:
            self._own_sums = OwnSums.agreed(self.world, own)
        if own or self._own_sums.names:
            self._own_sums.add(own, self._last)
        window = (self._window.digest, self.asked_to_stop(), self._mark) if self._last else ()
        sums = StepSums.pack(loss, *(window or (0,)))
        number = self._window.first + self._index
        self.buffers.take(number, len(self._window) * self.world.world_size, self._last)
        total = loss.total if self.loss_scale is None else loss.total * self.loss_scale.value
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, enabled=False):
            self.strategy.backward(total, sums, self._last)

    def step(self, lr: float) -> PendingStep:
        """Divide the gradient by the step's count, clip it, and update the weights.

        All ranks have the same sums, so all decide alike whether to apply the step. `lr`: the rate of the first
        parameter group whose rate is not 0; the other groups keep their ratio to it, or follow `own_factors`.
        """
        optimizer = self.strategy.optimizer
        assert optimizer is not None, "this engine only evaluates"
        self._mark = mark_of(lr)
        for group, base_rate in zip(optimizer.param_groups, self._base_rates, strict=True):
            factor = self.own_factors.get(group.get("place", REST))
            group["lr"] = lr * (base_rate / (self.base_rate or 1.0)) if factor is None else base_rate * factor
        waits = self.waits or not self.strategy.can_update_on_device
        step = (self._update_on_host if waits else self._update_on_device)(self.strategy.sums.result(), lr)
        self.clock.lap("optimizer")
        return step

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which forwards use the average of the weights. Collective."""
        assert self.average is not None, "give the engine `ema`"
        return self.average.in_use()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest holds in addition to the shards."""
        scale, frozen = self.loss_scale, self.strategy.frozen
        _, tied = named_state(self.module)
        return {
            "loss_scale": None if scale is None else {"value": scale.value, "updates": scale.updates},
            "numbers": self.strategy.numbers(),
            "tied": tied,
            **({} if frozen is None else frozen.record(self.module)),
        }

    def shards(self) -> dict[str, Shard]:
        """Return what this rank writes into a checkpoint."""
        shards = self.strategy.shards()
        return shards if self.average is None else {**shards, **self.average.shards()}

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        """Load a checkpoint, if `reset_optimizer` without the optimizer's state and the average of the weights.

        Raises MismatchError if it was saved with another model or optimizer.
        """
        self.strategy.load(path, manifest, reset_optimizer)
        if self.average is not None and not self.average.load(path, manifest, begin=reset_optimizer):
            self.warn(f"{path} has no average of the weights; the average begins with its weights (train.ema)")
        if (scale := manifest["loss_scale"]) is not None and self.mixed_precision == "fp16":
            self.loss_scale = LossScale(scale["value"], scale["updates"])

    def load_weights(self, path: Path, manifest: dict[str, Any]) -> None:
        """Begin with weights from files in the folder `path`; so does their average. `manifest`: as a checkpoint's."""
        self.strategy.load(path, manifest, reset_optimizer=True)
        if self.average is not None:
            self.average.load(path, manifest, begin=True)

    def warm_up_ddp_buckets(self, task: Task, window: Window) -> None:
        """On resume, run one throw-away forward and backward so that DDP rebuilds its buckets before the first real
        step.

        DDP rebuilds its buckets after the first backward. Without this call, the first step of a resumed run would be
        reduced in the initial layout, and rounded differently than in an uninterrupted run (seen on 4 processes).
        """
        self._window, self._index, self._last = window, 0, True
        self.buffers.begin()
        with self.strategy.accumulate(last=True), self.autocast():
            batch = self.to_device(next(iter(window)))
            self.backward(task.loss(task.forward(self.model, batch), batch))
        self.strategy.sums.result()
        self._own_result()
        self.strategy.zero_grad()
        self.buffers.finish(applied=False)

    def _update_on_host(self, sums_on_device: Tensor, lr: float) -> PendingStep:
        """Wait for the sums of all ranks, and decide on the host whether to apply the step."""
        sums, scale, grad_norm = sums_on_device.tolist(), self.loss_scale, math.nan
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
        if self.average is not None:
            self.average.update(applied=math.isfinite(grad_norm))
        return PendingStep(sums, grad_norm, lr, value, self._own_result())

    def _update_on_device(self, sums: Tensor, lr: float) -> PendingStep:
        """Do the same arithmetic on the device, without waiting for the numbers."""
        self.clock.lap("forward_backward")
        grad_norm = self.strategy.update(StepSums.factor(sums), self.max_grad_norm)
        self.buffers.finish(applied=grad_norm.isfinite())
        if self.average is not None:
            self.average.update(applied=grad_norm.isfinite())
        return PendingStep(sums.clone(), grad_norm, lr, None, self._own_result())

    def _own_result(self) -> tuple[list[str], Tensor] | None:
        """Return the names and the window's sums of the task's own numbers; None if it has none."""
        own = self._own_sums
        return own.result() if own is not None and own.names else None

    def _first_loss_scale(self, loss: Loss, window: Window) -> LossScale:
        """Return GradScaler's first scale, which is meant for a mean, divided by an estimate of the step's count.

        The estimate is made from micro-batch 0, which rank 0 has for any number of processes, so all start alike.
        """
        count = self.world.on_rank_0(lambda: max(1, int(loss.count)))
        halvings = round(math.log2(count * len(window) * self.world.world_size))
        return LossScale(_FIRST_SCALE_OF_A_MEAN / 2**halvings)
