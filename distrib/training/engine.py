"""What a micro-batch, a backward and an update mean on many processes and in mixed precision."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.data.loader import Window
from distrib.data.order import derive_seed
from distrib.task import Loss
from distrib.training import strategies
from distrib.training.totals import Totals, WithTotals, ride
from distrib.world import World

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
APPLIED = "applied"


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank. `loss` is the mean over the whole window before the update."""

    verdict: str  # applied | skipped:<reason>
    loss: float
    count: float  # whole, unless items have weights
    grad_norm: float  # before clipping
    lr: float
    digest: int  # of the samples read by all ranks, see data/order.py
    loss_scale: float | None = None  # fp16 only

    @property
    def applied(self) -> bool:
        return self.verdict == APPLIED


class Engine:
    """Thin over accelerate: it places and wraps the model; what a window needs is here."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        optimizer: Optimizer | None = None,  # none: to evaluate only
        *,
        mixed_precision: str = "no",
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.world = world
        self.module = module  # the user's own
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.mixed_precision = mixed_precision
        self.dtype = _DTYPES.get(mixed_precision)
        self.accelerator = strategies.accelerator(world)
        self.device = world.device
        with_totals = WithTotals(module).to(self.device)
        self.totals = with_totals.totals
        self.model: nn.Module = with_totals
        if world.world_size > 1 and optimizer is not None:
            self.model = self.accelerator.prepare_model(with_totals)
        self._all_parameters = list(self.model.parameters())  # Module.zero_grad walks through all modules every time
        groups = optimizer.param_groups if optimizer is not None else []
        self.parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self.base_rate = float(groups[0]["lr"]) if groups else 0.0
        self._rate_ratios = [group["lr"] / (self.base_rate or 1.0) for group in groups]
        self.scaler: torch.amp.GradScaler | None = None  # fp16 only, made when the first count is known
        self._generators = [torch.default_generator.manual_seed]
        if self.device.type != "cpu":  # not run here: see docs/not-run-here.md
            self._generators.append(torch.get_device_module(self.device).manual_seed)
        self._window: Window | None = None
        self._whole_count = True
        self._last = False

    def to_device(self, batch: Any) -> Any:
        """Move a nested batch to this rank's device, without waiting for the copy."""
        return batch if self.device.type == "cpu" else send_to_device(batch, self.device, non_blocking=True)

    @contextmanager
    def microbatch(self, window: Window, index: int) -> Iterator[None]:
        """Random numbers that belong to this micro-batch, autocast, and no synchronisation before the last."""
        self._window, self._last = window, index == len(window) - 1
        self.seed_random(derive_seed(self.seed, window.step, window.first + index))
        with ExitStack() as contexts:
            if not self._last:
                contexts.enter_context(self.accelerator.no_sync(self.model))
            if self.dtype is not None:
                contexts.enter_context(torch.autocast(self.device.type, self.dtype))
            yield

    def seed_random(self, seed: int) -> None:
        """torch's generators of the CPU and of this device. torch.manual_seed takes 100 times as long."""
        for manual_seed in self._generators:
            manual_seed(seed)

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (running statistics), as DDP does before a training forward."""
        if self.world.world_size > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)

    def zero_grad(self) -> None:
        """Once a window, before its first backward."""
        for parameter in self._all_parameters:
            parameter.grad = None

    def backward(self, loss: Loss) -> None:
        """Add the gradient of `loss.total`; on the window's last micro-batch, sum over the ranks."""
        assert self._window is not None, "backward belongs into engine.microbatch"
        if self.mixed_precision == "fp16" and self.scaler is None:
            self.scaler = self._first_scaler(loss, self._window)
        count = loss.count
        self._whole_count = not (count.is_floating_point() if isinstance(count, Tensor) else isinstance(count, float))
        shares = Totals.pack(loss, self._window.digest if self._last else 0, self.world.world_size)
        total = loss.total if self.scaler is None else self.scaler.scale(loss.total)
        with torch.autocast(self.device.type, enabled=False) if self.dtype else nullcontext():
            ride(total, self.totals, shares).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        """Normalise by the window's count, clip, update. All ranks see the same numbers, so all decide alike.

        `lr` is the first parameter group's rate; the others keep their ratio to it.
        """
        assert self.optimizer is not None, "this engine only evaluates"
        assert self.totals.grad is not None, "step follows backward"
        totals = Totals.unpack(self.totals.grad, self._whole_count)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss_scale = None
        if self.scaler is not None:
            loss_scale = self.scaler.get_scale()
            self.scaler.unscale_(self.optimizer)
        # DDP left the mean over the ranks of sums; what is wanted is their sum by the count.
        factor = self.world.world_size / totals.count if totals.count else 0.0
        grad_norm = torch.nn.utils.get_total_norm(gradients).item() * factor
        verdict = self._verdict(totals, grad_norm)
        if verdict == APPLIED:
            if self.max_grad_norm is not None:
                factor *= min(1.0, self.max_grad_norm / (grad_norm + 1e-6))  # as torch's clip_grad_norm_
            torch._foreach_mul_(gradients, factor)
            for group, ratio in zip(self.optimizer.param_groups, self._rate_ratios, strict=True):
                group["lr"] = lr * ratio
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        loss = totals.loss / totals.count if totals.count else 0.0
        return StepResult(verdict, loss, totals.count, grad_norm, lr, totals.digest, loss_scale)

    def _verdict(self, totals: Totals, grad_norm: float) -> str:
        if totals.count == 0:
            return "skipped:no_items"
        if not math.isfinite(totals.loss):
            return "skipped:nonfinite_loss"
        if not math.isfinite(grad_norm):
            return "skipped:loss_scale" if self.scaler is not None else "skipped:nonfinite_gradient"
        return APPLIED

    def _first_scaler(self, loss: Loss, window: Window) -> torch.amp.GradScaler:
        """torch's usual first scale is meant for a mean; ours is of a sum, so divide it by the likely count.

        Micro-batch 0 of the step is rank 0's whatever the number of processes, so all worlds begin alike.
        """
        count = self.world.on_rank_0(lambda: max(1, int(loss.count)))
        halvings = round(math.log2(count * len(window) * self.world.world_size))
        return torch.amp.GradScaler(self.device.type, init_scale=2.0 ** (16 - halvings))
