"""The samples that each rank reads, as a pure function of the step."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data
from torch.utils.data import Dataset

from distrib.data.order import Order, Positions

_CHUNK = 4096  # positions computed at once, which makes the cost per step negligible


class MicroBatch(NamedTuple):
    """Samples that are read together: dataset index `indices[i]` is at position `positions[i]` of the run.

    Both are uint64 arrays of shape (micro_batch_size,).
    """

    positions: Positions
    indices: Positions


class DistributedSampler(torch.utils.data.DistributedSampler[Any]):
    """Yields this rank's sample indices from step `start` up to step `stop`.

    Step `s` reads positions `[s * G, (s + 1) * G)` of the run, where `G` is `global_batch_size`. Rank `r` of `W` reads
    the `r`-th contiguous block of `G / W` positions. So the global batch of a step does not depend on the number of
    processes. Positions continue from one epoch to the next: nothing is padded, repeated or dropped between epochs.

    Unlike torch's sampler, one iteration covers all epochs. Use `seek` instead of `set_epoch`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
        stop: int,
        order: Order | None = None,
    ) -> None:
        """`order`: by default a permutation for each epoch, or the dataset's order without `shuffle`."""
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        assert global_batch_size % (micro_batch_size * num_replicas) == 0, "RunPlan refuses such a config"
        self.order = order or Order(len(dataset), seed, shuffle)  # type: ignore[arg-type]
        self.size = self.order.size
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_samples = global_batch_size // num_replicas  # for this rank and each step
        self.start = start
        self.stop = stop

    def seek(self, step: int) -> None:
        """Continue at `step`, in O(1)."""
        self.start = step

    def set_epoch(self, epoch: int) -> None:
        """Seek to the first step that lies wholly in `epoch` or later."""
        self.seek(-(-epoch * self.size // self.global_batch_size))

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches in order: `global_batch_size / micro_batch_size / num_replicas` per step."""
        within = np.arange(self.num_samples, dtype=np.uint64) + np.uint64(self.rank * self.num_samples)
        steps_at_once = max(1, _CHUNK // self.num_samples)
        for first in range(self.start, self.stop, steps_at_once):
            steps = np.arange(first, min(first + steps_at_once, self.stop), dtype=np.uint64)
            positions = (steps[:, None] * np.uint64(self.global_batch_size) + within).reshape(-1)
            indices = self.order.indices(positions)
            shape = (-1, self.micro_batch_size)
            yield from map(MicroBatch, positions.reshape(shape), indices.reshape(shape))

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(micro_batch.indices.tolist() for micro_batch in self.micro_batches())

    def __len__(self) -> int:
        return (self.stop - self.start) * self.num_samples
