"""Running statistics of batch and instance normalisation, as if one process ran a step's micro-batches in order.

A forward changes a running statistic by `running = (1 - momentum) * running + momentum * statistic`. Several forwards
in a row therefore make `keep ** n * running + effect` of it: `n` is the number of forwards, `keep` is `1 - momentum`,
and `effect` does not depend on `running`. So every micro-batch begins with the step's first value, its effect is
computed from what it left, and effects are joined in the order of the micro-batches, whatever rank they come from.
With `momentum=None` torch keeps the mean over all forwards: there `n * mean` is the sum to which each forward adds.

Effects are joined in a binary tree and in float64, so that any number of processes gives the same bits if each has a
power of two of micro-batches, as `train.determinism: bitwise` asks, and the same within rounding otherwise.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from distrib.processes.world import World


def has_running_statistics(module: nn.Module) -> bool:
    """Is it a normalisation of torch's that follows the rule above?"""
    return (
        isinstance(module, _BatchNorm | _InstanceNorm)
        and module.track_running_stats
        and all(isinstance(module._buffers.get(key), Tensor) for key in STATISTICS)
    )


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """The running statistics of some normalisations, as one vector: means and variances, then numbers of forwards."""

    def __init__(self, world: World, norms: list[Any]) -> None:
        self._world, self._norms = world, norms
        self._dtype = torch.float32 if world.device.type == "mps" else torch.float64  # Metal has no float64
        self._momenta: list[float | None] = []
        self._partial: list[tuple[int, Tensor]] = []  # (level, effect of 2^level micro-batches), as a binary counter
        self._work: dist.Work | None = None
        for norm in norms:
            if isinstance(norm, _InstanceNorm) and _count_forward not in norm._forward_hooks.values():
                norm.register_forward_hook(_count_forward)

    def begin(self) -> None:
        """Take the statistics as they are for those that every micro-batch of the step begins with."""
        self._start = self._read()
        self._partial.clear()
        if self._momenta != (momenta := [norm.momentum for norm in self._norms]):
            self._momenta = momenta
            self._describe()

    def add(self) -> None:
        """After the forward of a micro-batch: compute its effect, and join it to those before."""
        start, now = self._start, self._read()
        counted = (now - start)[-len(self._norms) :]
        # A class derived from torch's may change its statistics without counting.
        changed = torch.zeros_like(counted).scatter_reduce_(0, self._norm, (now != start).to(self._dtype), "amax")
        now[-len(self._norms) :] = start[-len(self._norms) :] + torch.maximum(counted, changed)
        effect = now * self._weight(now) - self._kept(start * self._weight(start), self._num(now - start))
        level = 0
        while self._partial and self._partial[-1][0] == level:
            effect = self._joined(self._partial.pop()[1], effect)
            level += 1
        self._partial.append((level, effect))

    def send(self) -> None:
        """After the last micro-batch of this rank: give the effect of all of them to the other ranks."""
        effect = self._partial.pop()[1]
        while self._partial:
            effect = self._joined(self._partial.pop()[1], effect)
        self._effects = [effect]  # of each rank
        if self._world.world_size > 1:
            self._effects = [torch.empty_like(effect) for _ in range(self._world.world_size)]
            self._work = dist.all_gather(self._effects, effect, async_op=True)

    def write_merged(self, applied: bool | Tensor) -> None:
        """Make the step's effect on the statistics, if the step was applied."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if applied is False:
            return
        effects = self._effects
        while len(effects) > 1:
            pairs = [effects[place : place + 2] for place in range(0, len(effects), 2)]
            effects = [self._joined(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        start, effect = self._start, effects[0]
        num = self._num(effect)
        merged = (self._kept(start * self._weight(start), num) + effect) / self._weight(start + effect)
        used = num > 0
        self._write(torch.where(used if isinstance(applied, bool) else used & applied, merged, start))

    def _joined(self, first: Tensor, then: Tensor) -> Tensor:
        """The effect of some micro-batches, and then of others."""
        return self._kept(first, self._num(then)) + then

    def _kept(self, values: Tensor, num: Tensor) -> Tensor:
        """What `num` forwards leave of `values`."""
        return values * self._keep**num

    def _num(self, values: Tensor) -> Tensor:
        """For each element the number of forwards."""
        return values[-len(self._norms) :][self._norm]

    def _weight(self, values: Tensor) -> Tensor:
        """By which a statistic is multiplied to be a sum: with momentum 1, without it the number of forwards so far."""
        return torch.where(self._cumulative, self._num(values), 1.0)

    def _describe(self) -> None:
        """For each element of the vector: whose it is, how much a forward keeps of it, and whether it is a mean over
        all forwards."""
        device, momenta = self._start.device, self._momenta
        sizes = torch.tensor([2 * len(norm.running_mean) for norm in self._norms])
        norm = torch.arange(len(sizes))
        keep = torch.tensor([1.0 if momentum is None else 1.0 - momentum for momentum in momenta], dtype=self._dtype)
        cumulative = torch.tensor(
            [momentum is None and isinstance(n, _BatchNorm) for n, momentum in zip(self._norms, momenta, strict=True)]
        )
        self._norm = torch.cat([norm.repeat_interleave(sizes), norm]).to(device)
        self._keep = torch.cat([keep.repeat_interleave(sizes), torch.ones_like(keep)]).to(device)
        self._cumulative = torch.cat([cumulative.repeat_interleave(sizes), torch.zeros_like(cumulative)]).to(device)

    def _read(self) -> Tensor:
        counts = torch.stack([norm.num_batches_tracked for norm in self._norms])
        return torch.cat([torch.cat(self._statistics()).to(self._dtype), counts.to(self._dtype)])

    def _write(self, values: Tensor) -> None:
        statistics = self._statistics()
        *parts, counts = torch.split(values, [*(len(tensor) for tensor in statistics), len(self._norms)])
        torch._foreach_copy_(statistics, parts)
        for norm, count in zip(self._norms, counts, strict=True):
            if isinstance(norm, _BatchNorm):
                norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]

    def _statistics(self) -> list[Tensor]:
        return [tensor for norm in self._norms for tensor in (norm.running_mean, norm.running_var)]


def _count_forward(norm: Any, *_: object) -> None:
    """Instance normalisation has a number of forwards, too, but does not count."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
