"""Merges running statistics of batch and instance normalisation as if one process ran all micro-batches in order.

A forward updates a running statistic by `running = (1 - momentum) * running + momentum * statistic`. After `n` forwards
its value is `keep ** n * running + effect`, where `keep` is `1 - momentum` and `effect` does not depend on `running`.
So every micro-batch starts with the value from the start of the step, and its effect is computed from the value after
it. The effects of all ranks are combined in the order of the micro-batches. With `momentum=None`, torch keeps the mean
over all forwards; then `n * mean` is a sum to which each forward adds.

Effects are combined in a binary tree in float64. If each rank has a power of two of micro-batches, as
`train.determinism: bitwise` requires, the result has the same bits for any number of processes; else it agrees within
rounding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from distrib.processes.world import World


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether the module is a torch normalisation layer that follows the update rule above."""
    return (
        isinstance(module, _BatchNorm | _InstanceNorm)
        and module.track_running_stats
        and all(isinstance(module._buffers.get(key), Tensor) for key in STATISTICS)
    )


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """The running statistics of some layers as one vector: all means and variances, then the numbers of forwards."""

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
        """Record the current statistics, with which every micro-batch of the step starts."""
        self._start = self._read()
        self._partial.clear()
        if self._momenta != (momenta := [norm.momentum for norm in self._norms]):
            self._momenta = momenta
            self._describe()

    def add(self) -> None:
        """Compute the effect of a micro-batch after its forward, and combine it with the effects before."""
        start, now = self._start, self._read()
        counted = (now - start)[-len(self._norms) :]
        # A subclass of a torch layer may update its statistics without counting the forward.
        changed = torch.zeros_like(counted).scatter_reduce_(0, self._norm, (now != start).to(self._dtype), "amax")
        now[-len(self._norms) :] = start[-len(self._norms) :] + torch.maximum(counted, changed)
        effect = now * self._weight(now) - self._decay(start * self._weight(start), self._num_forwards(now - start))
        level = 0
        while self._partial and self._partial[-1][0] == level:
            effect = self._combine(self._partial.pop()[1], effect)
            level += 1
        self._partial.append((level, effect))

    def send(self) -> None:
        """Start to send the effect of this rank's micro-batches to the other ranks, after the last of them."""
        effect = self._partial.pop()[1]
        while self._partial:
            effect = self._combine(self._partial.pop()[1], effect)
        self._effects = [effect]  # of each rank
        if self._world.world_size > 1:
            self._effects = [torch.empty_like(effect) for _ in range(self._world.world_size)]
            self._work = dist.all_gather(self._effects, effect, async_op=True)

    def write_merged(self, applied: bool | Tensor) -> None:
        """Write the statistics after the step, if the step was applied."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if applied is False:
            return
        effects = self._effects
        while len(effects) > 1:
            pairs = [effects[index : index + 2] for index in range(0, len(effects), 2)]
            effects = [self._combine(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        start, effect = self._start, effects[0]
        num = self._num_forwards(effect)
        merged = (self._decay(start * self._weight(start), num) + effect) / self._weight(start + effect)
        used = num > 0
        self._write(torch.where(used if isinstance(applied, bool) else used & applied, merged, start))

    def _combine(self, first: Tensor, then: Tensor) -> Tensor:
        """Return the effect of some micro-batches followed by others."""
        return self._decay(first, self._num_forwards(then)) + then

    def _decay(self, values: Tensor, num: Tensor) -> Tensor:
        """Return the part of `values` that is left after `num` forwards."""
        return values * self._keep**num

    def _num_forwards(self, values: Tensor) -> Tensor:
        """Return the number of forwards for each element."""
        return values[-len(self._norms) :][self._norm]

    def _weight(self, values: Tensor) -> Tensor:
        """Return the factor that turns a statistic into a sum: 1 with momentum, else the number of forwards so far."""
        return torch.where(self._cumulative, self._num_forwards(values), 1.0)

    def _describe(self) -> None:
        """Compute for each element of the vector: the index of its layer (`_norm`), the factor that a forward
        multiplies it by (`_keep`), and whether it is a mean over all forwards (`_cumulative`)."""
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
    """Count a forward of an instance normalisation, because torch has the counter but does not increase it."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
