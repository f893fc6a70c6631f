"""Adds up the task's own numbers, `Loss.sums`, over a step.

Each micro-batch's numbers are gathered, and added in float64 in the order of the micro-batches. So the sum of the same
numbers has the same bits for any number of processes, and sums of whole numbers are exact. It takes one small
collective a step, which runs during the last backward. Without such numbers there is one in the first step alone, in
which the ranks agree on that.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.errors import ConfigError
from distrib.processes.world import World

Pair = tuple[float | Tensor, float | Tensor]


class OwnSums:
    """Call `add` for each micro-batch, just before its backward, and `result` after the last one."""

    def __init__(self, world: World, names: list[str]) -> None:
        self.names = names
        self._world = world
        self._dtype = torch.float32 if world.device.type == "mps" else torch.float64  # Metal has no float64
        self._own: list[Tensor] = []  # of this rank's micro-batches, each of shape (names, 2)
        self._gathered: Tensor | None = None
        self._work: dist.Work | None = None

    @classmethod
    def agreed(cls, world: World, sums: Mapping[str, Pair]) -> "OwnSums":
        """Take the names from each rank's first micro-batch. Collective. Raises ConfigError if they differ."""
        every = world.all_gather_object(sorted(sums))
        for rank, names in enumerate(every):
            if names != every[0]:
                raise ConfigError(_differ(f"on rank {rank}", names, "on rank 0", every[0]))
        return cls(world, every[0])

    def add(self, sums: Mapping[str, Pair], last: bool) -> None:
        """Add a micro-batch's. `last`: of the window; then also start to gather them. Raises ConfigError."""
        if sums.keys() != set(self.names):
            raise ConfigError(_differ("in a later micro-batch", sorted(sums), "in the first one", self.names))
        self._own.append(self._pack([number for name in self.names for number in sums[name]]))
        if last:
            own = torch.stack(self._own)
            self._own = []
            self._gathered = own
            if self._world.world_size > 1:
                gathered = own.new_empty(self._world.world_size, *own.shape)
                self._work = dist.all_gather(list(gathered), own, async_op=True)
                self._gathered = gathered.flatten(0, 1)

    def result(self) -> tuple[list[str], Tensor]:
        """Return the names, and the window's sums over all ranks, shape (names, 2), on the device."""
        assert self._gathered is not None, "no backward since the last step"
        if self._work is not None:
            self._work.wait()
        gathered, self._gathered, self._work = self._gathered, None, None
        return self.names, gathered.sum(dim=0)

    def _pack(self, numbers: list[float | Tensor]) -> Tensor:
        """Return shape (names, 2). Numbers that are on a GPU stay there, so that the host does not wait."""
        host = [0.0 if isinstance(number, Tensor) else float(number) for number in numbers]
        device = self._world.device
        pinned = torch.tensor(host, dtype=self._dtype, pin_memory=device.type != "cpu")
        values = pinned.to(device, non_blocking=True)
        for place, number in enumerate(numbers):
            if isinstance(number, Tensor):
                values[place] = number.detach().reshape(())
        return values.view(-1, 2)


def _differ(where: str, names: list[str], before: str, others: list[str]) -> str:
    return (
        f"task.loss: the names of the Loss's sums are {', '.join(names) or 'none'} {where}, but {before} "
        f"{', '.join(others) or 'none'}; give the same names each time, with (0, 0) where there is nothing to count"
    )
