"""Reads the micro-batches of each step, with worker processes if the config has some, and records the samples read."""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from distrib.data.order import Positions, derive_seed, digest
from distrib.data.sampler import DistributedSampler, MicroBatch
from distrib.data.shapes import describe
from distrib.errors import ConfigError
from distrib.processes.lifetimes import shield_worker, starting_workers
from distrib.tracebacks import summary, users_lines

Collate: TypeAlias = Callable[[list[Any]], Any]
COLLATING = 0xC0  # separates the seed of a micro-batch's collate from the seeds of its samples
_IN_WORKER = (
    f"\n{ConfigError.__module__}.{ConfigError.__name__}: "  # torch puts a worker's traceback before the message
)


class Read(NamedTuple):
    """A collated batch, and the micro-batch (positions and indices) that it was read for."""

    micro_batch: MicroBatch
    batch: Any
    after: Any = None  # of a ShardedStream: where its reader is then


class Window:
    """This rank's micro-batches of one optimizer step. Iterating reads them; `len` returns their number."""

    def __init__(self, step: int, first: int, length: int, reads: Iterator[Read]) -> None:
        self.step = step
        self.first = first  # index of this rank's first micro-batch among those of the step
        self.digest = 0  # of the samples read so far, see data/order.py
        self._length = length
        self._reads = reads

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._length):
            read = next(self._reads)
            self.digest = (self.digest + digest(*read.micro_batch)) % 2**64
            yield read.batch


class DevicePrefetcher:
    """Copies each batch to the device on a separate stream, while the model computes with the previous batch."""

    def __init__(self, device: torch.device, copy: Callable[[Any], Any]) -> None:
        """`copy(batch)` returns the batch on the device, and does not wait for the copy to finish."""
        self._device, self._copy = device, copy
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def read(self, reads: Iterator[Read]) -> Iterator[Read]:
        """Yield `reads` in order, on the device. Reads one micro-batch ahead."""
        current: tuple[Read, torch.Event | None] | None = None
        for read in reads:
            following = self._start_copy(read)
            if current is not None:
                yield self._wait_for_copy(*current)
            current = following
        if current is not None:
            yield self._wait_for_copy(*current)

    def _start_copy(self, read: Read) -> tuple[Read, torch.Event | None]:
        if self._stream is None:
            return read._replace(batch=self._copy(read.batch)), None
        # Not run here: see docs/not-run-here.md. Kernels in flight may still use memory that the copy will reuse.
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            return read._replace(batch=self._copy(read.batch)), self._stream.record_event()

    def _wait_for_copy(self, read: Read, copied: torch.Event | None) -> Read:
        if copied is not None:  # not run here, either
            torch.accelerator.current_stream(self._device).wait_event(copied)
        return read


def train_windows(
    sampler: DistributedSampler, prefetcher: DevicePrefetcher | None = None, **loading: Any
) -> Iterator[Window]:
    """Yield one window for each step from the sampler's `start` to its `stop`. `loading` as for `data_loader`."""
    loading = {**loading, "seed": sampler.seed, "epoch_size": 1 if sampler.order.samples_recur else sampler.size}
    reads: Iterator[Read] = iter(data_loader(sampler.dataset, sampler.micro_batches(), **loading))
    if prefetcher is not None:
        reads = prefetcher.read(reads)
    length = sampler.num_samples // sampler.micro_batch_size
    for step in range(sampler.start, sampler.stop):
        yield Window(step, sampler.rank * length, length, reads)


def data_loader(
    dataset: Dataset[Any],
    micro_batches: Iterable[MicroBatch],
    *,
    seed: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    collate: Collate | None = None,
    epoch_size: int | None = None,
) -> DataLoader[Read]:
    """Return a DataLoader that yields a Read for each micro-batch, in order.

    If the dataset has `__getitems__`, it is called with the indices of the whole micro-batch. If it returns a list of
    samples, they are collated as usual; anything else is used as the batch. A plain TensorDataset is indexed directly.
    `collate`: the task's, instead of torch's default_collate. `epoch_size`: as for SampleReader.
    """
    reader = SampleReader(dataset, seed, collate, epoch_size)
    return batch_loader(reader, micro_batches, num_workers, prefetch_factor, pin_memory)


def batch_loader(
    reader: Dataset[Any],
    micro_batches: Iterable[Any],
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> DataLoader[Read]:
    """Return a DataLoader that yields the result of `reader.__getitems__` for each micro-batch, in order."""
    return _Loader(
        reader,
        batch_sampler=micro_batches,  # torch reads any iterable of keys
        collate_fn=_identity,  # the reader has collated already
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=shield_worker if num_workers else None,
        generator=torch.Generator(),  # otherwise the loader would draw from the model's generator
    )


class _Loader(DataLoader[Read]):
    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        with starting_workers():
            return _one_line_refusals(super().__iter__())


def _one_line_refusals(reads: Iterator[Read]) -> Iterator[Read]:
    """Yield what workers read. A ConfigError that one of them raised keeps its message, without the worker's frames."""
    try:
        yield from reads
    except ConfigError as error:
        raise ConfigError(str(error).partition(_IN_WORKER)[2].strip() or str(error)) from None


class SampleReader(Dataset[Any]):
    """Reads a micro-batch, with generators seeded for each sample. Runs in the worker processes, if there are some."""

    def __init__(
        self, dataset: Dataset[Any], seed: int, collate: Collate | None = None, epoch_size: int | None = None
    ) -> None:
        """`epoch_size`: after so many positions a sample has other random numbers; by default the dataset's length."""
        self.dataset = dataset
        self.seed = seed
        self.collate = collate
        self.size = epoch_size or len(dataset)  # type: ignore[arg-type]
        self.fetch: Callable[[list[int]], Any] | None = getattr(dataset, "__getitems__", None)
        plain = isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__
        direct = plain and collate is None
        self.tensors: tuple[Tensor, ...] | None = dataset.tensors if direct else None  # type: ignore[attr-defined]

    def __getitems__(self, micro_batch: MicroBatch) -> Read:
        if self.tensors is not None:
            chosen = torch.from_numpy(micro_batch.indices.view(np.int64))
            return Read(micro_batch, tuple(tensor.index_select(0, chosen) for tensor in self.tensors))
        if self.fetch is not None:
            self._seed_for(micro_batch.positions[0], micro_batch.indices[0])
            batch = self.fetch(micro_batch.indices.tolist())
            return Read(micro_batch, self._collated(micro_batch, batch) if isinstance(batch, list) else batch)
        samples = []
        for position, index in zip(*micro_batch, strict=True):
            self._seed_for(position, index)
            samples.append(self.dataset[int(index)])
        return Read(micro_batch, self._collated(micro_batch, samples))

    def _collated(self, micro_batch: MicroBatch, samples: list[Any]) -> Any:
        """Collate samples. Raises ConfigError if they cannot be collated."""
        if self.collate is not None:
            self._seed_for(micro_batch.positions[0], micro_batch.indices[0], COLLATING)
            return collated(self.collate, samples)
        try:
            return default_collate(samples)
        except (TypeError, RuntimeError, KeyError, ValueError):
            shown = [describe(sample) for sample in samples]
            other = next((number for number, one in enumerate(shown) if one != shown[0]), None)
            found = f"one is {shown[0]}" + ("" if other is None else f", another {shown[other]}")
            raise ConfigError(
                f"task: the samples of {type(self.dataset).__name__} cannot be collated into a batch: {found}; give "
                "tensors or numbers, of the same shape in all samples (pad them), or define Task.collate(samples)"
            ) from None

    def _seed_for(self, position: Positions, index: Positions, *purpose: int) -> None:
        """Seed the generators from (seed, epoch, index), so that they do not depend on which process reads when."""
        seed_generators(derive_seed(self.seed, int(position) // self.size, int(index), *purpose))


def seed_generators(seed: int) -> None:
    """Seed the generators that a dataset may draw from: torch's, Python's and numpy's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds devices, and takes 100 times as long
    random.seed(seed)
    np.random.seed(seed % 2**32)


def collated(collate: Collate, samples: list[Any]) -> Any:
    """Call the task's collate. Raises ConfigError if it fails or returns nothing."""
    try:
        batch = collate(samples)
    except ConfigError:
        raise
    except Exception as error:
        failed = f"task.collate failed on {len(samples)} samples, the first is {describe(samples[0])}"
        raise ConfigError(f"{failed}\n{users_lines(error) or summary(error)}") from None
    if batch is None:
        raise ConfigError("task.collate: returned None; return the batch that forward and loss take")
    return batch


def _identity(read: Any) -> Any:
    return read
