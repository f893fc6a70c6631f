"""Streams in shards, whose order is a function of the position, so that any number of processes can read them.

Micro-batch `m` of each step reads the next samples of lane `m`. The shards of each pass over the data are permuted, and
dealt to the `M` lanes in turn: lane `m` gets those at the places m, m + M, …, and reads one after the other. So a lane
does not depend on the processes, and each process reads the shards of its own micro-batches alone.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from distrib.data.order import Order, Positions, sample_indices

MOST_SHARDS = 2**24
_OFFSET_BITS = 40  # of a sample's index, which is made of its shard and its offset


class ShardedStream(IterableDataset[Any], ABC):
    """A stream that can be opened at any sample of any shard: a file, an object in a store, a range of keys.

    Every rank gets the whole stream; distrib decides which shards it reads, and seeds the random generators before each
    sample.
    """

    @abstractmethod
    def shards(self) -> Sequence[str]:
        """Return the shards' names, the same in every process and at every start."""

    @abstractmethod
    def open(self, shard: str, offset: int) -> Iterator[Any]:
        """Return an iterator over the samples of a shard, without the first `offset`. They are the same at each call,
        but for random numbers."""

    def __iter__(self) -> Iterator[Any]:
        for shard in self.shards():
            yield from self.open(shard, 0)


class FirstSamples(Dataset[Any]):
    """The first sample of each shard, for the fingerprint."""

    def __init__(self, stream: ShardedStream) -> None:
        self.stream, self.names = stream, list(stream.shards())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        return next(iter(self.stream.open(self.names[index], 0)))


class ShardOrder(Order):
    """The order of a ShardedStream. The index of a sample is its shard's number and its offset in one integer.

    It follows from the lengths of the shards, which become known when a shard has been read to its end.
    """

    def __init__(
        self,
        num_shards: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        lengths: Mapping[int, int] | None = None,
        known_steps: int = 0,
    ) -> None:
        """`lengths`: by the shard's number, of all shards that had been read to their end after `known_steps` steps."""
        super().__init__(num_shards, seed)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.num_lanes = global_batch_size // micro_batch_size
        self.lengths, self.known_steps = lengths or {}, known_steps
        self._begins: dict[int, list[int]] = {}  # for each lane, the place in the lane at which each visit begins

    def visit(self, lane: int, number: int) -> tuple[int, int]:
        """Return pass and shard of a lane's `number`-th visit of a shard, counted from 0."""
        own = len(range(lane, self.size, self.num_lanes))
        passes, place = divmod(number, own)
        position = np.array([passes * self.size + lane + place * self.num_lanes], dtype=np.uint64)
        return passes, int(sample_indices(position, self.size, self.seed)[0])

    def indices(self, positions: Positions) -> Positions:
        found = [index_of(shard, offset) for shard, offset in map(self._sample, positions.tolist())]
        return np.array(found, dtype=np.uint64)

    def knows(self, step: int) -> bool:
        """Return whether the samples of a step follow from the lengths that are known."""
        if step < self.known_steps:
            return True
        first = step * self.global_batch_size
        last = range(first + self.micro_batch_size - 1, first + self.global_batch_size, self.micro_batch_size)
        return all(self._sample(position)[0] in self.lengths for position in last)

    def record(self) -> dict[str, Any]:
        return {"by": "shards", "count": self.size}

    def _sample(self, position: int) -> tuple[int, int]:
        """Return shard and offset of the sample at a position. A shard of unknown length counts as endless."""
        step, rest = divmod(position, self.global_batch_size)
        lane, place = divmod(rest, self.micro_batch_size)
        place += step * self.micro_batch_size
        begins, empty = self._begins.setdefault(lane, [0]), 0
        while begins[-1] <= place and empty <= self.size:  # more empty shards in a row end the run, see shard_reader
            length = self.lengths.get(self.visit(lane, len(begins) - 1)[1])
            if length is None:
                break
            begins.append(begins[-1] + length)
            empty = 0 if length else empty + 1
        number = bisect_right(begins, place) - 1
        return self.visit(lane, number)[1], place - begins[number]


def index_of(shard: int, offset: int) -> int:
    """Return the index of a sample, for digests."""
    return shard << _OFFSET_BITS | offset
