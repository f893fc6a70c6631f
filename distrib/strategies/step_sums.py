"""Sums the loss and the number of items of a window over all ranks.

The gradient is divided by the number of items in the window. That number is known only after the last micro-batch of
every rank. A collective of its own for these few numbers would take a fifth of a small step (see benchmarks/). So the
model gets one more parameter, which is not trained. Its gradient is set to these numbers, and is accumulated and
all-reduced in the same buckets as all gradients.

This does not work for strategies that shard or compress gradients. They run a small all-reduce of their own during the
last backward.
"""

import struct
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.data.order import derive_seed
from distrib.processes.world import World
from distrib.task import Loss

_LIMB = 12  # bits in a limb, a part of an integer; sums of limbs over 4,096 ranks are exact in float32
_NUM_LIMBS = 6  # limbs in a 64-bit digest
_MARKS = 64  # so that the sum of their squares over 4,096 ranks is exact in float32
SIZE = 8 + _NUM_LIMBS


@dataclass(frozen=True)
class StepSums:
    """Sums over a window on all ranks."""

    loss: float
    count: float  # a whole number, unless items have weights
    digest: int
    stop: bool  # whether a rank was asked to stop
    same_rates: bool  # whether the marks of the ranks' rates are the same

    @staticmethod
    def pack(loss: Loss, digest: int, stop: bool = False, mark: int | None = None) -> Tensor:
        """Return the values that a micro-batch adds to the window's sums, shape (SIZE,).

        `mark`: the `mark_of` this rank's rate in the step before; None in all micro-batches of a window but the last.
        """
        count = loss.count
        weighted = count.is_floating_point() if isinstance(count, Tensor) else isinstance(count, float)
        high, low = (0, 0) if isinstance(count, Tensor) else divmod(count, 2**_LIMB)
        limbs = [digest >> (_LIMB * number) & (2**_LIMB - 1) for number in range(_NUM_LIMBS)]
        # On a GPU, copy from pinned memory: another copy would wait for all kernels that were launched before.
        marks = (0, 0, 0) if mark is None else (1, mark, mark**2)
        host = (0, high, low, weighted, stop, *marks, *limbs)
        pinned = torch.tensor(host, dtype=torch.float32, pin_memory=loss.total.device.type != "cpu")
        values = pinned.to(loss.total.device, non_blocking=True)
        values[0] = loss.total.detach()
        if isinstance(count, Tensor):  # its value stays on the device, so that the host does not wait
            values[1] = torch.floor_divide(count, 2**_LIMB)
            values[2] = torch.remainder(count, 2**_LIMB)
        return values

    @staticmethod
    def factor(sums: Tensor) -> Tensor:
        """Return 1 / count, on the device of the sums.

        If there are no items, or the loss is not finite, the result is not finite, so the update is skipped.
        """
        loss, high, low, *_ = sums.unbind()
        factor: Tensor = 1.0 / (high * 2**_LIMB + low) + 0.0 * loss
        return factor

    @classmethod
    def unpack(cls, sums: list[float]) -> "StepSums":
        """Read the window's sums. The count is rounded if all counts were whole numbers.

        The ranks' marks are equal if the square of their sum is the sum of their squares times their number.
        """
        loss, high, low, weighted, stop, *more = sums
        (ranks, mark, square), limbs = map(round, more[:3]), more[3:]
        digest = sum(round(limb) << (_LIMB * number) for number, limb in enumerate(limbs))
        count = round(high) * 2**_LIMB + (low if weighted > 0 else round(low))
        return cls(loss, count, digest % 2**64, stop > 0, mark**2 == ranks * square)


def mark_of(rate: float) -> int:
    """Return a hash of a learning rate that the ranks compare. Of 64 pairs of different rates one has the same mark."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", rate))
    return derive_seed(bits) % _MARKS


class SumsOfWindow(Protocol):
    """Adds up the window's loss and count."""

    def result(self) -> Tensor:
        """Return the sums over window and ranks, shape (SIZE,), after the last backward."""


class AllReducedSums:
    """Adds the sums of a window's micro-batches, and all-reduces them while the last backward runs."""

    def __init__(self, world: World) -> None:
        self._world_size = world.world_size
        self._sum: Tensor | None = None
        self._work: dist.Work | None = None

    def add(self, sums: Tensor, last: bool) -> None:
        """Add the sums of a micro-batch. Call this just before its backward."""
        self._sum = sums if self._sum is None else self._sum + sums
        if last and self._world_size > 1:
            self._work = dist.all_reduce(self._sum, async_op=True)

    def result(self) -> Tensor:
        """Return the sums over window and ranks, and start the next window at 0."""
        assert self._sum is not None, "no backward since the last step"
        if self._work is not None:
            self._work.wait()
        result, self._sum, self._work = self._sum, None, None
        return result


class SumsInBuckets(nn.Module):
    """The user's module, with one more parameter. Its gradient is the sums."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.sums = nn.Parameter(torch.zeros(SIZE))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def add_to_backward(self, total: Tensor, sums: Tensor) -> Tensor:
        """Return `total` unchanged, because the parameter is 0. Backward adds `sums` to the parameter's gradient."""
        return total + self.sums.dot(sums)

    def result(self) -> Tensor:
        """Return the sums over window and ranks. Call this after the last backward."""
        assert self.sums.grad is not None, "no backward since the last step"
        return self.sums.grad
