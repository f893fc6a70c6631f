"""What came of a step. Every step ends with a verdict, which schedule, ledger, tracking and counters read alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrib.strategies.step_sums import StepSums

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
    stop: bool = False  # some rank was asked to

    @property
    def applied(self) -> bool:
        return self.verdict == APPLIED


class PendingStep:
    """A step that was made. What came of it is read when the next one is on its way, so that nobody waits for the
    device."""

    def __init__(self, sums: Tensor | list[float], grad_norm: Tensor | float, lr: float, scale: float | None) -> None:
        """`sums` as `StepSums.pack` has them, over the window and the ranks; tensors where only the device knows
        them yet."""
        self._lr, self._scale = lr, scale
        self._sums, self._grad_norm = sums, grad_norm
        self._there: torch.Event | None = None
        if isinstance(sums, Tensor) and sums.device.type != "cpu":  # not run here: see docs/not-run-here.md
            self._sums, self._grad_norm = _on_its_way(sums), _on_its_way(grad_norm)
            self._there = torch.Event(device=sums.device)
            self._there.record()

    @property
    def known(self) -> bool:
        """Could `read` say it at once?"""
        return self._there is None or self._there.query()

    def wait(self) -> None:
        """Until this step is over, not for what came after it."""
        if self._there is not None:
            self._there.synchronize()

    def read(self) -> StepResult:
        """What came of it, once that is known."""
        self.wait()
        values = self._sums.tolist() if isinstance(self._sums, Tensor) else self._sums
        sums, grad_norm = StepSums.unpack(values), float(self._grad_norm)
        loss = sums.loss / sums.count if sums.count else math.nan
        if sums.count == 0:
            verdict, grad_norm = "skipped:no_items", math.nan
        elif not math.isfinite(loss):
            verdict, grad_norm = "skipped:nonfinite_loss", math.nan
        elif not math.isfinite(grad_norm):
            verdict = "skipped:nonfinite_gradient" if self._scale is None else "skipped:loss_scale"
        else:
            verdict = APPLIED
        return StepResult(verdict, loss, sums.count, grad_norm, self._lr, sums.digest, self._scale, sums.stop)


def _on_its_way(values: Any) -> Tensor:
    """From the device into memory that it can write to while we go on."""
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
