"""Updates whole tensors where ranks hold shards of them: for optimizers that look at whole matrices, such as Muon.

Each tensor has one owner, a rank. In a step, the owner gathers the shards of gradient and weights, and updates the
tensor as one process would. It keeps the optimizer's state, and sends every rank its shard of the new weights. Why it
is so: docs/decisions/0031-whole-matrices-have-owners.md.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard
from distrib.strategies.optimizer_state import is_elementwise, members_of

ROUND = 16 << 20  # bytes of weights that an owner gathers at once; of a larger tensor, all
Piece = tuple[str, Tensor, Callable[[Tensor], Shard | None]]  # see Strategy.pieces


def with_owners(optimizer: Optimizer, named: list[tuple[str, nn.Parameter]]) -> tuple[Optimizer, list["OnOwners"]]:
    """Return an optimizer over shards of the `named` parameters, and those of its members whose updates owners do,
    because they need whole tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in named}
    members = [one if is_elementwise(one) else OnOwners(one, names) for one in members_of(optimizer)]
    if hasattr(optimizer, "members"):
        optimizer.members = members
        optimizer.param_groups = [group for member in members for group in member.param_groups]
    else:
        (optimizer,) = members
    return optimizer, [member for member in members if isinstance(member, OnOwners)]


def assign(shapes: dict[str, tuple[int, ...]], world_size: int) -> dict[str, int]:
    """Return each tensor's owner. The tensor with the most work is given first, to the rank that has the least.

    The work of a matrix is its number of elements times its shorter side, as in a Newton-Schulz iteration.
    """
    ranks = [(0, rank) for rank in range(world_size)]
    owners = {}
    for name in sorted(shapes, key=lambda name: -_work(shapes[name])):
        work, owner = ranks[0]
        owners[name] = owner
        heapq.heapreplace(ranks, (work + _work(shapes[name]), owner))
    return owners


def _work(shape: tuple[int, ...]) -> int:
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return rows * columns * min(rows, columns)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's shards are."""

    shape: tuple[int, ...]
    owner: int
    offsets: tuple[int, ...]  # of each rank's shard
    sizes: tuple[int, ...]  # of each rank's shard, in elements; 0 if it has none


class OnOwners(Optimizer):
    """An optimizer whose tensors are updated whole, each by its owner. To all others it is one over the shards."""

    def __init__(self, whole: Optimizer, names: dict[Tensor, str]) -> None:
        """`whole`: will update the tensors. `names`: those of its parameters."""
        super().__init__([dict(group) for group in whole.param_groups], {})
        self.whole, self._groups = whole, self.param_groups
        self.owned: dict[str, nn.Parameter] = {}  # what this rank owns; without elements between two steps
        self._names = [[names[parameter] for parameter in group["params"]] for group in whole.param_groups]
        self._places: dict[str, _Place] = {}  # none before `begin`

    def begin(self, pieces: Iterable[Piece], world: World) -> None:
        """Give every tensor its owner. Until then, `step` does nothing. Collective.

        `pieces`: those of the strategy, the same names in the same order on all ranks.
        """
        mine = {name for names in self._names for name in names}
        self._rank, self._control = world.rank, world.control
        self._pieces = {name: (tensor, cut) for name, tensor, cut in pieces if name in mine}
        self._of: dict[Tensor, list[str]] = {}  # the names of what a parameter group's tensor holds
        for name, (tensor, _) in self._pieces.items():
            self._of.setdefault(tensor, []).append(name)
        shards = {name: cut(tensor) for name, (tensor, cut) in self._pieces.items()}
        everyone = world.all_gather_object(
            {name: (s.shape, s.offset, s.tensor.numel(), s.copy) for name, s in shards.items() if s is not None}
        )
        self._copies = [max((copy for *_, copy in one.values()), default=0) for one in everyone]
        shapes = {name: next(one[name][0] for one in everyone if name in one) for name in self._pieces}
        self._places = {}
        for name, owner in assign(shapes, world.world_size).items():
            found = [one.get(name, (None, 0, 0, 0)) for one in everyone]
            self._places[name] = _Place(shapes[name], owner, *zip(*((one[1], one[2]) for one in found), strict=True))
        for group, names in zip(self.whole.param_groups, self._names, strict=True):
            own = [name for name in names if self._places[name].owner == world.rank]
            group["params"] = [nn.Parameter(_local(self._pieces[name][0].detach()).new_empty(0)) for name in own]
            self.owned.update(zip(own, group["params"], strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update those tensors of which the parameter groups have shards now. Collective."""
        if not self._places:
            return  # DeepSpeed makes a step over zeros while it starts
        for given, group in zip(self._groups, self.whole.param_groups, strict=True):
            group.update({key: value for key, value in given.items() if key != "params"})
        rounds = self._rounds(name for group in self.param_groups for one in group["params"] for name in self._of[one])
        arriving = [self._gather(names) for names in rounds[:1]]
        leaving: list[tuple[list[str], _Exchange]] = []
        for number, names in enumerate(rounds):
            arriving += [self._gather(following) for following in rounds[number + 1 : number + 2]]
            self._update(names, arriving.pop(0))  # meanwhile the next round's tensors arrive, and the last one's leave
            for stored in leaving:
                self._store(*stored)
            leaving = [(names, self._scatter(names))]
        for stored in leaving:
            self._store(*stored)

    def states(self) -> Iterator[tuple[str, dict[str, Any], Callable[[Tensor], Shard]]]:
        """For each tensor that this rank owns: its name, its state, and what makes a Shard of a tensor in that."""
        for name, parameter in self.owned.items():
            if parameter in self.whole.state:
                yield name, self.whole.state[parameter], lambda value: Shard(value, tuple(value.shape))

    def elsewhere(self) -> list[str]:
        """Return the names of the tensors that other ranks own."""
        return [name for name, place in self._places.items() if place.owner != self._rank]

    def _rounds(self, names: Iterable[str]) -> list[list[str]]:
        """Put the names in rounds. In each, an owner has tensors of up to ROUND bytes, and all have one dtype."""
        rounds: dict[tuple[str, int], list[str]] = {}
        filled: dict[tuple[str, int], tuple[int, int]] = {}
        for name in names:
            place, tensor = self._places[name], self._pieces[name][0]
            size, key = math.prod(place.shape) * tensor.element_size(), (str(tensor.dtype), place.owner)
            number, used = filled.get(key, (0, 0))
            if used and used + size > ROUND:
                number, used = number + 1, 0
            filled[key] = number, used + size
            rounds.setdefault((key[0], number), []).append(name)
        return [rounds[key] for key in sorted(rounds)]

    def _gather(self, names: list[str]) -> "_Exchange":
        """Send my shards of gradients and weights to the owners, and receive those of the tensors that I own.

        Where there are several copies of the model, an owner takes the shards of its own.
        """
        mine = self._copies[self._rank]
        sent: list[list[Tensor]] = [[] for _ in self._copies]
        for name in names:
            (tensor, cut), place = self._pieces[name], self._places[name]
            if place.sizes[self._rank] and self._copies[place.owner] == mine:
                assert tensor.grad is not None, f"{name} has no gradient"
                sent[place.owner] += [_shard(cut, tensor.grad), _shard(cut, tensor)]
        received = [
            [size for name in self._own(names) for size in [self._places[name].sizes[rank]] * 2 if copy == mine]
            for rank, copy in enumerate(self._copies)
        ]
        return self._exchange(sent, received, names)

    def _update(self, names: list[str], arriving: "_Exchange") -> None:
        parts = arriving.result()
        for name in self._own(names):
            place, parameter = self._places[name], self.owned[name]
            gradient, weights = (parameter.new_empty(math.prod(place.shape)) for _ in range(2))
            for part, offset, size in zip(parts, place.offsets, place.sizes, strict=True):
                if part:
                    gradient[offset : offset + size] = part.pop(0)
                    weights[offset : offset + size] = part.pop(0)
            parameter.data, parameter.grad = weights.view(place.shape), gradient.view(place.shape)
        self.whole.step()

    def _scatter(self, names: list[str]) -> "_Exchange":
        """Send the shards of the new weights to all ranks that hold them, and receive mine."""
        sent: list[list[Tensor]] = [[] for _ in self._copies]
        received: list[list[int]] = [[] for _ in self._copies]
        for name in names:
            place = self._places[name]
            received[place.owner].append(place.sizes[self._rank])
            if place.owner == self._rank:
                weights = self.owned[name].data.view(-1)
                for rank, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
                    sent[rank].append(weights[offset : offset + size])
        exchange = self._exchange(sent, received, names)
        for name in self._own(names):
            self.owned[name].data, self.owned[name].grad = self.owned[name].new_empty(0), None
        return exchange

    def _store(self, names: list[str], leaving: "_Exchange") -> None:
        parts = leaving.result()
        for name in names:
            tensor, cut = self._pieces[name]
            part = parts[self._places[name].owner].pop(0)
            if len(part):
                shard = _shard(cut, tensor)
                shard.copy_(part.view(shard.shape))

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if self._places[name].owner == self._rank]

    def _exchange(self, sent: list[list[Tensor]], received: list[list[int]], names: list[str]) -> "_Exchange":
        like = _local(self._pieces[names[0]][0])
        return _Exchange(sent, received, like, self._control if like.device.type == "cpu" else None)


class _Exchange:
    """Tensors on their way between all ranks."""

    def __init__(
        self, sent: list[list[Tensor]], received: list[list[int]], like: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        """Start. `sent`: the tensors to each rank. `received`: the numbers of elements of those from each rank."""
        flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
        self._sent = torch.cat(flat) if flat else like.new_empty(0)
        self._sizes, self._work = received, None
        self._received = self._sent
        if len(sent) > 1:
            counts = [sum(sizes) for sizes in received]
            self._received = like.new_empty(sum(counts))
            given = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
            self._work = dist.all_to_all_single(self._received, self._sent, counts, given, group=group, async_op=True)

    def result(self) -> list[list[Tensor]]:
        """Wait, and return the tensors from each rank, one-dimensional."""
        if self._work is not None:
            self._work.wait()
        parts = iter(torch.split(self._received, [size for sizes in self._sizes for size in sizes]))
        return [[next(parts) for _ in sizes] for sizes in self._sizes]


def _shard(cut: Callable[[Tensor], Shard | None], tensor: Tensor) -> Tensor:
    shard = cut(tensor)
    assert shard is not None, "this rank has a part of it"
    return shard.tensor


def _local(tensor: Tensor) -> Tensor:
    """Return what a DTensor has on this rank; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
