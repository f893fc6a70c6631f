"""A step changes the model's buffers in the same way whatever the number of processes, or not at all if it is skipped.

Every micro-batch of a step begins with the same buffers, so that its forward does not depend on which rank ran what
before it. After the last one the running statistics of torch's normalisations are merged (running_statistics.py). How
other buffers may be merged cannot be known: of them the step keeps what its first micro-batch made.

A forward may change a buffer in place, or assign another tensor to its name. So buffers are looked up by name, and
values go into the tensor that the model had before, which others may refer to. Buffers that are not persistent are
caches, left to each rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.errors import TrainingError
from distrib.processes.world import World
from distrib.training.running_statistics import STATISTICS, RunningStatistics, has_running_statistics

_STEPS_IN_A_ROW = 3  # in which a cache is filled anew before it is taken for something else


@dataclass
class _Buffer:
    """A name in a module, and the tensor that belongs to it between steps."""

    owner: nn.Module
    key: str
    name: str
    tensor: Tensor
    start: Tensor | None = None  # a copy of the values that the step began with
    version: int = -1  # of the tensor, when it had those values
    untracked: bool = False  # kernels change it that leave its version as it is, such as batch normalisation's
    result: Tensor | None = None  # what the step's first micro-batch made of it, if anything
    left: tuple[int, int] = field(default=(0, 0))  # by the last forward
    changes: int = 0  # steps in a row

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

    def look(self) -> None:
        """Find out whether it is untracked."""
        assert self.start is not None, "begin comes first"
        if not self.changed and not torch.equal(_bytes(self.tensor), _bytes(self.start)):
            self.untracked = True

    def state(self) -> tuple[int, int]:
        """Differs after any change of it."""
        return id(self.current), self.current._version


class Buffers:
    """Those of one module. For each step: `begin`, a forward, `take`, `restore`, a forward, `take`, …, `finish`."""

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
        # The largest elements first: then each begins at a multiple of its size when they travel as bytes.
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
        self._begun = self._looked = False
        self._sent: Tensor | None = None
        self._work: dist.Work | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Take the buffers as they are for those that every micro-batch of the step begins with."""
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
        """After the forward of the step's micro-batch `number`, before its backward, in which activation checkpointing
        may run the forward again. After this rank's last one the ranks' changes are sent, beside the backward."""
        self._require_known()
        if not self._looked:  # this takes its time, so only in the first step
            for buffer in self._others:
                buffer.look()
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
            self._looked = True
            self._watch_caches()
            self._send()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what the step began with."""
        for buffer in self._persistent:
            buffer.restore()

    @torch.no_grad()
    def next(self) -> None:
        """Between two micro-batches of a step."""
        self._require_left()
        self.restore()

    @torch.no_grad()
    def finish(self, applied: bool | Tensor) -> None:
        """End the step: with the buffers that it made, or with those that it began with if it was not applied. A tensor
        where only the device knows."""
        self._require_left()
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
        """Forwards that leave no trace, as in evaluation."""
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
        """Raises TrainingError where forward made a buffer that a new model does not have."""
        made = [name for owner, key, name in self._absent if owner._buffers.get(key) is not None]
        if not self._looked:
            known = {buffer.name for buffer in self._persistent}
            made += [name for *_, name, tensor in _persistent(self._module) if name not in known and tensor is not None]
        if made:
            raise TrainingError(
                f"task.model: forward made the buffer {made[0]}, which a new model does not have, so that no "
                "checkpoint of it would be loaded; register it with values of its shape in __init__, or with "
                "persistent=False if it is a cache"
            )

    def _require_left(self) -> None:
        """Raises TrainingError where a backward changed a buffer."""
        for buffer in self._others:
            if buffer.left != buffer.state():
                raise TrainingError(
                    f"task.model: the buffer {buffer.name} was changed in a backward. Activation checkpointing runs "
                    "forward again there, with another value than the first time, which makes the gradient wrong; "
                    "leave strategy.activation_checkpointing out"
                )

    def _watch_caches(self) -> None:
        for cache in self._caches:
            cache.changes = cache.changes + 1 if cache.changed else 0
        self._warn_of(
            [cache for cache in self._caches if cache.changes == _STEPS_IN_A_ROW],
            "in every step, but not persistent: not saved, and each process has its own; if more than a cache, "
            "register it with persistent=True",
        )

    def _warn_of(self, buffers: list[_Buffer], how: str) -> None:
        """Once for each."""
        names = [buffer.name for buffer in buffers if buffer.name not in self._warned]
        if names:
            self._warned.update(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._warn(f"forward changes the buffer {names[0]}{more} {how}")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _require_shape(buffer: _Buffer) -> None:
    current = buffer.current
    if current is None or current.shape != buffer.tensor.shape:
        made = "None" if current is None else f"one of the shape {list(current.shape)}"
        raise TrainingError(
            f"task.model: forward made the buffer {buffer.name} {made}, where a new model has the shape "
            f"{list(buffer.tensor.shape)}, so that no checkpoint of it could be loaded; keep its shape, or register "
            "it with persistent=False if it is a cache"
        )


def _all(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor | None]]:
    """Owner, key, name and tensor of every buffer, also of those that are None."""
    for prefix, owner in module.named_modules():
        for key, tensor in owner._buffers.items():
            yield owner, key, f"{prefix}.{key}".lstrip("."), tensor


def _persistent(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor | None]]:
    for owner, key, name, tensor in _all(module):
        if key not in owner._non_persistent_buffers_set:
            yield owner, key, name, tensor
