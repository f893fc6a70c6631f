"""Reads the micro-batches of a ShardedStream, in a worker process if there are some."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch.utils.data import Dataset, default_collate

from distrib.data.fingerprint import sample_print
from distrib.data.loader import COLLATING, Collate, Read, collated, seed_generators
from distrib.data.order import derive_seed
from distrib.data.prints import same
from distrib.data.sampler import MicroBatch
from distrib.data.shapes import describe
from distrib.data.shards import ShardedStream, ShardOrder, index_of
from distrib.errors import ConfigError

Cursor: TypeAlias = tuple[int, int]  # of a lane: how many shards it has begun before this one, and the offset in it
_NOTHING = object()


class Request(NamedTuple):
    """The micro-batch `lane` of a step."""

    step: int
    lane: int


class After(NamedTuple):
    """Where a lane is after a read, and the lengths of the shards that have ended in it, by their numbers."""

    lane: int
    visit: int
    offset: int
    ended: dict[int, int]


class ShardReader(Dataset[Any]):
    """Reads the next samples of a lane. All requests for a lane come to the same process, in the order of the steps."""

    def __init__(
        self,
        stream: ShardedStream,
        order: ShardOrder,
        cursors: Mapping[int, Cursor],
        lengths: Mapping[int, int],
        collate: Collate | None,
    ) -> None:
        """`cursors`: where each lane begins. `lengths`: those that are known, by the shards' numbers."""
        self.stream, self.order, self.collate = stream, order, collate or default_collate
        self.names = list(stream.shards())
        self._lanes = {number: _Lane(self, number, *cursor) for number, cursor in cursors.items()}
        self.lengths = dict(lengths)

    def __getitems__(self, request: Request) -> Read:
        order, lane = self.order, self._lanes[request.lane]
        samples, indices, ended = lane.take(order.micro_batch_size)
        first = request.step * order.global_batch_size + request.lane * order.micro_batch_size
        positions = np.arange(first, first + order.micro_batch_size, dtype=np.uint64)
        seed_generators(derive_seed(order.seed, request.step, request.lane, COLLATING))
        batch = collated(self.collate, samples)
        micro_batch = MicroBatch(positions, np.array(indices, dtype=np.uint64))
        return Read(micro_batch, batch, After(request.lane, lane.number, lane.offset, ended))


class _Lane:
    def __init__(self, reader: ShardReader, lane: int, number: int, offset: int) -> None:
        self.reader, self.lane, self.number, self.offset = reader, lane, number, offset
        self._samples: Iterator[Any] | None = None  # of the open shard

    def take(self, count: int) -> tuple[list[Any], list[int], dict[int, int]]:
        """Return the next samples, their indices, and the lengths of the shards that have ended."""
        order, samples = self.reader.order, list[Any]()
        indices, ended, empty = list[int](), dict[int, int](), 0
        while len(samples) < count:
            passes, shard = order.visit(self.lane, self.number)
            if self._samples is None:
                self._samples = self._open(shard)
            seed_generators(derive_seed(order.seed, passes, index_of(shard, self.offset)))
            if (sample := next(self._samples, _NOTHING)) is not _NOTHING:
                samples.append(sample)
                indices.append(index_of(shard, self.offset))
                self.offset, empty = self.offset + 1, 0
                continue
            self._require_length(shard)
            ended[shard] = self.offset
            self.number, self.offset, self._samples, empty = self.number + 1, 0, None, empty + 1
            if empty > order.size:
                raise ConfigError(
                    f"task.train_dataset: {self._name}: the shards of micro-batch {self.lane} have no samples; leave "
                    "empty shards out"
                )
        return samples, indices, ended

    @property
    def _name(self) -> str:
        return type(self.reader.stream).__name__

    def _open(self, shard: int) -> Iterator[Any]:
        name = self.reader.names[shard]
        if self.lane == 0 and self.number == 0 and self.offset == 0:
            self._require_offsets(name)
        return self._opened(name, self.offset)

    def _opened(self, name: str, offset: int) -> Iterator[Any]:
        opened = self.reader.stream.open(name, offset)
        if not isinstance(opened, Iterable):
            raise ConfigError(
                f"task.train_dataset: {self._name}.open({name!r}, {offset}) returned {describe(opened)}; return an "
                "iterator over the samples of the shard"
            )
        return iter(opened)

    def _require_offsets(self, name: str) -> None:
        """Raise ConfigError if the shard's second sample is another if it is opened there."""
        walked, opened = (self._opened(name, offset) for offset in (0, 1))
        next(walked, _NOTHING)
        found = []
        for samples in (walked, opened):
            seed_generators(self.reader.order.seed)
            found.append(next(samples, _NOTHING))
        try:
            prints = [None if sample is _NOTHING else sample_print(sample) for sample in found]
        except TypeError:  # of a class that has no print
            return
        first, second = prints
        equal = first == second if first is None or second is None else same(first, second)
        if not equal:
            raise ConfigError(
                f"task.train_dataset: {self._name}.open({name!r}, 1) does not begin with the second sample of "
                f"open({name!r}, 0); leave out as many samples as the offset says, and draw no random numbers "
                "before the first"
            )

    def _require_length(self, shard: int) -> None:
        before = self.reader.lengths.setdefault(shard, self.offset)
        if before != self.offset:
            raise ConfigError(changed(self._name, self.reader.names[shard], before, self.offset))


def changed(stream: str, shard: str, before: int, now: int) -> str:
    """Describe a shard that has changed its length."""
    return (
        f"task.train_dataset: {stream}: shard {shard!r} had {before} samples, and now {now}; open() must return "
        "the same samples each time"
    )
