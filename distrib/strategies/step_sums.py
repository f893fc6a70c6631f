"""A window's loss and count travel in the gradient's own buckets.

How many items a window counts is known only when the last micro-batch of the last rank has been seen, and the
gradient cannot be normalised before. A collective of its own for a few numbers costs a fifth of a small step (see
benchmarks/); so the model is wrapped together with a parameter that nobody trains, whose gradient *is* those numbers:
it accumulates over micro-batches and is reduced over ranks exactly as the gradients are. Where gradients are sharded or
compressed on their way, that would not do: there a small all-reduce runs beside the last backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.processes.world import World
from distrib.task import Loss

_LIMB = 12  # bits: small enough that sums over 4,096 ranks are exact in float32
_NUM_LIMBS = 6  # of a 64-bit digest
SIZE = 5 + _NUM_LIMBS


@dataclass(frozen=True)
class StepSums:
    """Sums over a window on all ranks."""

    loss: float
    count: float  # whole, unless items have weights
    digest: int
    stop: bool  # a rank was asked to

    @staticmethod
    def pack(loss: Loss, digest: int, stop: bool = False) -> Tensor:
        """Return what one micro-batch adds to the window's sums, shape (SIZE,)."""
        count = loss.count
        weighted = count.is_floating_point() if isinstance(count, Tensor) else isinstance(count, float)
        high, low = (0, 0) if isinstance(count, Tensor) else divmod(count, 2**_LIMB)
        limbs = [digest >> (_LIMB * number) & (2**_LIMB - 1) for number in range(_NUM_LIMBS)]
        # Pinned where there is a device, or the copy would wait for all that was sent to it before.
        host = (0, high, low, weighted, stop, *limbs)
        pinned = torch.tensor(host, dtype=torch.float32, pin_memory=loss.total.device.type != "cpu")
        values = pinned.to(loss.total.device, non_blocking=True)
        values[0] = loss.total.detach()
        if isinstance(count, Tensor):  # without waiting for a device to say what it is
            values[1] = torch.floor_divide(count, 2**_LIMB)
            values[2] = torch.remainder(count, 2**_LIMB)
        return values

    @staticmethod
    def factor(sums: Tensor) -> Tensor:
        """1 / count, on the device where the sums lie; not finite where there is nothing to update with:
        no items, or a loss that is not finite."""
        loss, high, low, *_ = sums.unbind()
        factor: Tensor = 1.0 / (high * 2**_LIMB + low) + 0.0 * loss
        return factor

    @classmethod
    def unpack(cls, sums: list[float]) -> "StepSums":
        """Read the window's sums; rounds what is known to be whole: a count to which no float was added."""
        loss, high, low, weighted, stop, *limbs = sums
        digest = sum(round(limb) << (_LIMB * number) for number, limb in enumerate(limbs))
        count = round(high) * 2**_LIMB + (low if weighted > 0 else round(low))
        return cls(loss, count, digest % 2**64, stop > 0)


class AllReducedSums:
    """Adds up over the window, and over the ranks while the last backward runs."""

    def __init__(self, world: World) -> None:
        self._world_size = world.world_size
        self._sum: Tensor | None = None
        self._work: dist.Work | None = None

    def add(self, sums: Tensor, last: bool) -> None:
        """Just before a micro-batch's backward."""
        self._sum = sums if self._sum is None else self._sum + sums
        if last and self._world_size > 1:
            self._work = dist.all_reduce(self._sum, async_op=True)

    def result(self) -> Tensor:
        """The sum over window and ranks; the next window begins at 0."""
        assert self._sum is not None, "no backward since the last step"
        if self._work is not None:
            self._work.wait()
        result, self._sum, self._work = self._sum, None, None
        return result


class SumsInBuckets(nn.Module):
    """The user's module, and the parameter whose gradient is the sums."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.sums = nn.Parameter(torch.zeros(SIZE))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def add_to_backward(self, total: Tensor, sums: Tensor) -> Tensor:
        """`total` as it is; its backward also gives the parameter, which is 0, the gradient `sums`."""
        return total + self.sums.dot(sums)

    def result(self) -> Tensor:
        """The sum over window and ranks, after the last backward."""
        assert self.sums.grad is not None, "no backward since the last step"
        return self.sums.grad
