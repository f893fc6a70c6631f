"""A window's totals travel in the gradient's own buckets.

How many items a window counts is known only when the last micro-batch of the last rank has been seen, and the
gradient cannot be normalised before. A collective of its own for a few numbers costs a fifth of a small step (see
benchmarks/); so the model is wrapped together with a parameter that nobody trains, whose gradient *is* those numbers:
it accumulates over micro-batches and is reduced over ranks exactly as the gradients are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrib.task import Loss

_LIMB = 12  # bits: small enough that sums over 4,096 ranks are exact in float32
_NUM_LIMBS = 6  # of a 64-bit digest
_SIZE = 3 + _NUM_LIMBS


@dataclass(frozen=True)
class Totals:
    """Sums over a window on all ranks."""

    loss: float
    count: float  # whole, unless items have weights
    digest: int

    @staticmethod
    def pack(loss: Loss, digest: int, world_size: int) -> Tensor:
        """One micro-batch's share, shape (_SIZE,). Times `world_size`, because the reduction is a mean over ranks."""
        high, low = (0, 0) if isinstance(loss.count, Tensor) else divmod(loss.count, 2**_LIMB)
        limbs = [digest >> (_LIMB * number) & (2**_LIMB - 1) for number in range(_NUM_LIMBS)]
        host = [float(value * world_size) for value in (0, high, low, *limbs)]
        values = torch.tensor(host, device=loss.total.device)
        values[0] = loss.total.detach() * world_size
        if isinstance(loss.count, Tensor):  # without waiting for a device to say what it is
            values[1] = torch.floor_divide(loss.count, 2**_LIMB) * world_size
            values[2] = torch.remainder(loss.count, 2**_LIMB) * world_size
        return values

    @classmethod
    def unpack(cls, gradient: Tensor, whole_count: bool) -> "Totals":
        """From the reduced gradient of the parameter; rounds what is known to be whole."""
        loss, high, low, *limbs = gradient.tolist()
        digest = sum(round(limb) << (_LIMB * number) for number, limb in enumerate(limbs))
        count = round(high) * 2**_LIMB + (round(low) if whole_count else low)
        return cls(loss, count, digest % 2**64)


class WithTotals(nn.Module):
    """The user's module, and the parameter whose gradient is the totals."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.totals = nn.Parameter(torch.zeros(_SIZE))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, parameter: Tensor, totals: Tensor) -> Tensor:
        ctx.save_for_backward(totals)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (totals,) = ctx.saved_tensors
        return gradient, totals, None


def ride(total: Tensor, parameter: Tensor, totals: Tensor) -> Tensor:
    """`total` as it is; its backward also gives `parameter` the gradient `totals`."""
    result: Tensor = _Ride.apply(total, parameter, totals)  # type: ignore[no-untyped-call]
    return result
