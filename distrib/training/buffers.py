"""Keeps the model's buffers independent of the number of processes. A skipped step leaves them unchanged.

Every micro-batch of a step starts with the same buffers, so its forward does not depend on which rank ran which
micro-batches before. At the end of a step, the running statistics of torch's normalisation layers are merged
(running_statistics.py). How to merge other buffers is unknown: they keep the values after the step's first micro-batch.

A forward may change a buffer in place, or assign another tensor to its name. So buffers are looked up by name, and
values are copied into the original tensor, because other objects may refer to it. Non-persistent buffers are treated as
caches, and each rank keeps its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.errors import TrainingError, and_more
from distrib.processes.world import World
from distrib.training.running_statistics import STATISTICS, RunningStatistics, has_running_statistics

_STEPS_IN_A_ROW = 3  # a non-persistent buffer that changes in so many steps in a row is probably not a cache


@dataclass
class _Buffer:
    """A buffer: its module and name, and the tensor it has between steps."""

    owner: nn.Module
    key: str
    name: str
    tensor: Tensor
    start: Tensor | None = None  # copy of the values at the start of the step
    version: int = -1  # of the tensor at the start of the step
    untracked: bool = False  # changed by kernels that do not increase the version, as in batch normalisation
    result: Tensor | None = None  # value after the step's first micro-batch, if it changed
    left: tuple[int, int] = field(default=(0, 0))  # state() after the last forward
    changes: int = 0  # number of consecutive steps that changed it

    @property
    def current(self) -> Tensor:
        return self.owner._buffers.get(self.key)  # type: ignore[return-value]  # None is refused, see _require_shape

    @property
    def changed(self) -> bool:
        return self.untracked or self.current is not self.tensor or self.tensor._version != self.version

    def begin(self) -> None:
        if self.start is None or self.changed:
            self.tensor = self.current
            self.start = self.tensor.detach().clone()
            self.version = self.tensor._version
        self.result = None

    def restore(self) -> None:
        assert self.start is not None, "begin comes first"
        if self.current is not self.tensor:
            self.owner._buffers[self.key] = self.tensor
        if self.untracked or self.tensor._version != self.version:
            self.tensor.copy_(self.start)
            self.version = self.tensor._version

    def detect_untracked(self) -> None:
        """Set `untracked` if the values have changed but the version has not."""
        assert self.start is not None, "begin comes first"
        if not self.changed and not torch.equal(_bytes(self.tensor), _bytes(self.start)):
            self.untracked = True

    def state(self) -> tuple[int, int]:
        """Return a value that differs after any tracked change."""
        return id(self.current), self.current._version


class Buffers:
    """The buffers of one module. Calls in a step: `begin`, forward, `take`, `next`, forward, `take`, …, `finish`."""

    def __init__(self, world: World, module: nn.Module, warn: Callable[[str], None]) -> None:
        self._world, self._module, self._warn = world, module, warn
        norms = [part for part in module.modules() if has_running_statistics(part)]
        self._statistics = RunningStatistics(world, norms) if norms else None
        found = list(_persistent(module))
        self._persistent = [
            _Buffer(owner, key, name, tensor) for owner, key, name, tensor in found if tensor is not None
        ]
        self._absent = [(owner, key, name) for owner, key, name, tensor in found if tensor is None]
        of_norms = {(id(norm), key) for norm in norms for key in STATISTICS}
        # Largest dtypes first: then each is aligned when all are sent as one byte tensor.
        self._others = sorted(
            (buffer for buffer in self._persistent if (id(buffer.owner), buffer.key) not in of_norms),
            key=lambda buffer: -buffer.tensor.itemsize,
        )
        self._caches = [
            _Buffer(owner, key, name, tensor)
            for owner, key, name, tensor in _all(module)
            if key in owner._non_persistent_buffers_set and tensor is not None
        ]
        for buffer in self._persistent:
            buffer.untracked = (id(buffer.owner), buffer.key) in of_norms
        self._warned: set[str] = set()
        self._begun = self._detected = False
        self._sent: Tensor | None = None
        self._work: dist.Work | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Record the current buffers, with which every micro-batch of the step starts."""
        if not self._begun and self._world.world_size > 1:
            for buffer in self._persistent:
                self._world.broadcast(buffer.current)
        self._begun = True
        for buffer in self._persistent:
            buffer.begin()
        for cache in self._caches:
            if cache.current is not None:
                cache.tensor, cache.version = cache.current, cache.current._version
        if self._statistics is not None:
            self._statistics.begin()

    @torch.no_grad()
    def take(self, number: int, num_micro_batches: int, last: bool) -> None:
        """Record what the forward of the step's micro-batch `number` changed.

        Call it before the backward, in which activation checkpointing may run the forward again. After this rank's last
        micro-batch (`last`), changes are sent to the other ranks while the backward runs.
        """
        self._require_known()
        if not self._detected:  # slow, so only in the first step
            for buffer in self._others:
                buffer.detect_untracked()
        if self._statistics is not None:
            self._statistics.add()
        changed = [buffer for buffer in self._others if buffer.changed]
        for buffer in changed:
            _require_shape(buffer)
            if number == 0:
                buffer.result = buffer.current.detach().clone()
        if changed and num_micro_batches > 1:
            self._warn_of(
                changed,
                f"in a way that distrib cannot merge: each of a step's {num_micro_batches} micro-batches begins with "
                "the same value, and the step keeps what the first makes of it",
            )
        for buffer in self._others:
            buffer.left = buffer.state()
        if last:
            self._detected = True
            self._warn_of_caches()
            self._send()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers from the start of the step."""
        for buffer in self._persistent:
            buffer.restore()

    @torch.no_grad()
    def next(self) -> None:
        """Prepare for the next micro-batch of the step."""
        self._require_unchanged_by_backward()
        self.restore()

    @torch.no_grad()
    def finish(self, applied: bool | Tensor) -> None:
        """End the step: write the merged buffers, or if the step was not applied, restore those from its start.

        `applied`: a tensor if the result is only known on the device.
        """
        self._require_unchanged_by_backward()
        self.restore()
        if self._statistics is not None:
            self._statistics.write_merged(applied)
        if self._work is not None:
            self._work.wait()
        if applied is not False:
            self._write_others(applied)
        self._work = self._sent = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore all buffers on exit, so that forwards in the body have no lasting effect."""
        self.begin()
        try:
            yield
        finally:
            self.restore()

    def _send(self) -> None:
        if self._statistics is not None:
            self._statistics.send()
        if self._world.world_size > 1 and self._others:
            values = [buffer.start if buffer.result is None else buffer.result for buffer in self._others]
            self._sent = torch.cat(
                [
                    _bytes(value.to(buffer.tensor.dtype))  # type: ignore[union-attr]
                    for buffer, value in zip(self._others, values, strict=True)
                ]
            )
            self._work = dist.broadcast(self._sent, src=0, async_op=True)

    def _write_others(self, applied: bool | Tensor) -> None:
        offset = 0
        for buffer in self._others:
            result, start = buffer.result, buffer.start
            assert start is not None, "begin comes first"
            if self._sent is not None:
                size = start.numel() * start.itemsize
                result = self._sent[offset : offset + size].view(start.dtype).view(start.shape)
                offset += size
            if result is not None:
                buffer.tensor.copy_(result if isinstance(applied, bool) else torch.where(applied, result, start))

    def _require_known(self) -> None:
        """Raise TrainingError if forward created a buffer that a newly made model does not have."""
        made = [name for owner, key, name in self._absent if owner._buffers.get(key) is not None]
        if not self._detected:
            known = {buffer.name for buffer in self._persistent}
            made += [name for *_, name, tensor in _persistent(self._module) if name not in known and tensor is not None]
        if made:
            raise TrainingError(
                f"task.model: forward made the buffer {made[0]}, which a new model does not have, so a checkpoint "
                "with it could not be loaded; register it with values of its shape in __init__, or with "
                "persistent=False if it is a cache"
            )

    def _require_unchanged_by_backward(self) -> None:
        """Raise TrainingError if a backward changed a buffer."""
        for buffer in self._others:
            if buffer.left != buffer.state():
                raise TrainingError(
                    f"task.model: the buffer {buffer.name} was changed in a backward, where activation checkpointing "
                    "runs forward again; with another value than the first time, the gradient would be wrong; "
                    "leave strategy.activation_checkpointing out"
                )

    def _warn_of_caches(self) -> None:
        for cache in self._caches:
            cache.changes = cache.changes + 1 if cache.changed else 0
        self._warn_of(
            [cache for cache in self._caches if cache.changes == _STEPS_IN_A_ROW],
            "in every step, but it is not persistent: it is not saved, and each process has its own; if it is more "
            "than a cache, register it with persistent=True",
        )

    def _warn_of(self, buffers: list[_Buffer], how: str) -> None:
        """Warn once for each buffer."""
        names = [buffer.name for buffer in buffers if buffer.name not in self._warned]
        if names:
            self._warned.update(names)
            self._warn(f"forward changes the buffer {and_more(names, 1)} {how}")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _require_shape(buffer: _Buffer) -> None:
    current = buffer.current
    if current is None or current.shape != buffer.tensor.shape:
        made = "None" if current is None else f"a tensor of shape {list(current.shape)}"
        raise TrainingError(
            f"task.model: forward made the buffer {buffer.name} {made}, but a new model has shape "
            f"{list(buffer.tensor.shape)}, so a checkpoint could not be loaded; keep its shape, or register "
            "it with persistent=False if it is a cache"
        )


def _all(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor | None]]:
    """Yield owner, key, name and tensor of every buffer, including those that are None."""
    for prefix, owner in module.named_modules():
        for key, tensor in owner._buffers.items():
            yield owner, key, f"{prefix}.{key}".lstrip("."), tensor


def _persistent(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor | None]]:
    for owner, key, name, tensor in _all(module):
        if key not in owner._non_persistent_buffers_set:
            yield owner, key, name, tensor
