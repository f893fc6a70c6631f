"""Yields the windows of a run from a dataset with a length, which has no state but the step, or from a stream, whose
state is saved with each checkpoint."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from distrib.data.loader import DevicePrefetcher, Read, Window, batch_loader, collated, data_loader, train_windows
from distrib.data.order import Order
from distrib.data.sampler import DistributedSampler, MicroBatch
from distrib.data.shard_reader import Cursor, Request, ShardReader, changed
from distrib.data.shards import ShardedStream, ShardOrder
from distrib.errors import CheckpointError, ConfigError
from distrib.extras import require
from distrib.plan import RunPlan
from distrib.processes.lifetimes import shield_worker, starting_workers
from distrib.processes.world import World


class Source:
    """Reads a dataset with `__len__`. The global batches are the same for any number of processes."""

    order: Order | None = None  # by default a permutation for each epoch

    def __init__(self, dataset: Dataset[Any], plan: RunPlan, world: World, seed: int, loading: dict[str, Any]) -> None:
        """`loading`: keyword arguments of `data_loader`."""
        self.dataset, self.plan, self.world, self.seed, self.loading = dataset, plan, world, seed, loading

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        """Yield a window for each step from `start` to the end of the run. With a `prefetcher`, batches are on the
        device."""
        sampler = DistributedSampler(
            self.dataset,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            num_replicas=self.world.world_size,
            rank=self.world.rank,
            seed=self.seed,
            start=start,
            stop=self.plan.num_steps,
            order=self.order,
        )
        return train_windows(sampler, prefetcher, **self.loading)

    def some_batch(self) -> Any:
        """Return a micro-batch of the first samples as an example; None for a stream, which cannot be read twice."""
        first = np.arange(self.plan.micro_batch_size, dtype=np.uint64)
        # If the run has workers, one of them reads: later workers must not inherit a file that the dataset opens.
        workers = min(1, self.loading["num_workers"])
        options = {"num_workers": workers, "collate": self.loading.get("collate")}
        loader = data_loader(self.dataset, [MicroBatch(first, first)], seed=self.seed, **options)
        return next(iter(loader)).batch

    def state(self) -> Any:
        """Return the state of all ranks to save in a checkpoint. None: the step suffices. Collective."""
        return None

    def load(self, state: Any) -> None:
        """Restore the state that a checkpoint holds."""


class Stream(Source):
    """Reads an IterableDataset with torchdata's StatefulDataLoader. Each rank saves the state of its own loader.

    `train_dataset()` must split the samples between the ranks (`World.detect()` has rank and world_size), and between
    the workers of a rank.
    """

    _loader: Any = None
    _state: dict[str, Any] | None = None

    def __init__(self, dataset: Dataset[Any], plan: RunPlan, world: World, seed: int, loading: dict[str, Any]) -> None:
        """Arguments as for Source. Raises ConfigError if torchdata is missing."""
        require_stream_reader()
        super().__init__(dataset, plan, world, seed, loading)

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        """As for Source. `prefetcher` is ignored: it reads ahead, and a stream's state is the place it was read to."""
        reads = self._reads(start)
        length = self.plan.grad_accum_steps
        for step in range(start, self.plan.num_steps):
            yield Window(step, self.world.rank * length, length, reads)

    def some_batch(self) -> Any:
        return None

    def state(self) -> Any:
        mine = self._loader.state_dict()
        try:
            json.dumps(mine)
        except TypeError as error:
            name = type(self.dataset).__name__
            raise CheckpointError(
                f"task.train_dataset: the state_dict() of {name} cannot be saved as JSON: {error}"
            ) from None
        return self.world.all_gather_object(mine)

    def load(self, state: Any) -> None:
        if isinstance(state, dict):
            raise ConfigError("task.train_dataset: is a stream, but the checkpoint's run had a ShardedStream")
        saved = len(state or [])
        if saved != self.world.world_size:
            raise ConfigError(
                f"task.train_dataset: {type(self.dataset).__name__} is a stream that {saved} process(es) had read; "
                f"{self.world.world_size} cannot continue it, start {saved}; a "
                "distrib.data.ShardedStream goes on with any number"
            )
        assert state is not None, "as many as ranks"
        mine = state[self.world.rank]
        workers, before = self.loading["num_workers"], _num_workers(mine)
        if workers != before:
            raise ConfigError(
                f"data.num_workers: {workers}, but the stream {type(self.dataset).__name__} was read by {before} "
                f"worker(s), and each continues at its own place; set it to {before}"
            )
        self._state = mine

    def _reads(self, start: int) -> Iterator[Read]:
        """Yield micro-batches without end. When the stream ends, it is read again from its beginning."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # a warning for torchdata's authors
        size, per_rank = self.plan.micro_batch_size, self.plan.grad_accum_steps
        options = {**self.loading, "worker_init_fn": shield_worker}
        if (collate := options.pop("collate", None)) is not None:
            options["collate_fn"] = partial(collated, collate)
        if not options["num_workers"]:
            options.update(prefetch_factor=None, worker_init_fn=None)
        self._loader = StatefulDataLoader(self.dataset, size, drop_last=True, **options)
        if self._state is not None:
            self._loader.load_state_dict(self._state)
        number, empty = start * per_rank, 0
        while empty < 2:  # one pass without a batch is possible: the saved state may be at the end of the stream
            empty += 1
            with starting_workers() if self.loading["num_workers"] else nullcontext():
                batches = iter(self._loader)
            for batch in batches:
                if number == 0:
                    self._refuse_the_same(batch)
                empty = 0
                step, place = divmod(number, per_rank)
                first = step * self.plan.global_batch_size + (self.world.rank * per_rank + place) * size
                positions = np.arange(first, first + size, dtype=np.uint64)
                yield Read(MicroBatch(positions, positions), batch)
                number += 1
        raise ConfigError(f"task.train_dataset: {type(self.dataset).__name__} gives no micro-batch of {size} samples")

    def _refuse_the_same(self, batch: Any) -> None:
        """Raise ConfigError if two ranks have read the same first batch: then the stream is not split between them."""
        digests = self.world.all_gather_object(_digest(batch))
        for rank, digest in enumerate(digests):
            if (other := digests.index(digest)) != rank:
                raise ConfigError(
                    f"task.train_dataset: ranks {other} and {rank} read the same samples of the stream; split it, "
                    "World.detect() has rank and world_size"
                )


class ShardedSource(Source):
    """Reads a ShardedStream. The global batches are the same for any number of processes.

    Its state is where each lane is, and the lengths of the shards that have ended: what `ShardOrder` needs.
    """

    def __init__(self, dataset: ShardedStream, *arguments: Any) -> None:
        """Arguments as for Source."""
        super().__init__(dataset, *arguments)
        self.stream, plan = dataset, self.plan
        self.names = list(dataset.shards())
        self.shards = ShardOrder(len(self.names), plan.global_batch_size, plan.micro_batch_size, self.seed)
        self._began: tuple[dict[int, Cursor], dict[int, int]] = {}, {}  # cursors and lengths that windows() begins with
        self._now = self._began
        first = self.world.rank * plan.grad_accum_steps
        self._own = range(first, first + plan.grad_accum_steps)  # lanes of this rank

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        """As for Source. Each lane is read by one worker, so at most as many workers as lanes are started."""
        cursors, lengths = self._began
        self._now = {lane: cursors.get(lane, (0, 0)) for lane in self._own}, dict(lengths)
        reads: Iterator[Read] = iter(self._loader(start))
        if prefetcher is not None:
            reads = prefetcher.read(reads)
        reads = self._noted(reads)
        for step in range(start, self.plan.num_steps):
            yield Window(step, self._own.start, len(self._own), reads)

    def some_batch(self) -> Any:
        return next(iter(self._loader(0))).batch

    def state(self) -> Any:
        cursors, lengths = {}, dict[int, int]()
        for own, ended in self.world.all_gather_object(self._now):
            cursors.update(own)
            for shard, length in ended.items():
                if (before := lengths.setdefault(shard, length)) != length:
                    raise ConfigError(changed(type(self.dataset).__name__, self.names[shard], before, length))
        return {
            **self._identity(),
            "cursors": [cursors.get(lane, (0, 0)) for lane in range(self.shards.num_lanes)],
            "lengths": {str(shard): length for shard, length in sorted(lengths.items())},
        }

    def load(self, state: Any) -> None:
        name = type(self.dataset).__name__
        if not isinstance(state, dict):
            raise ConfigError(
                f"task.train_dataset: {name} is a ShardedStream, but the checkpoint is of a run without one"
            )
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ConfigError(
                    f"task.train_dataset: {name}: {key} is {value}, but {state.get(key)} in the checkpoint; a stream "
                    "goes on with the same only"
                )
        cursors = {lane: (int(number), int(offset)) for lane, (number, offset) in enumerate(state["cursors"])}
        self._began = cursors, {int(shard): length for shard, length in state["lengths"].items()}
        self._now = self._began

    def _identity(self) -> dict[str, int]:
        order = self.shards
        return {
            "seed": self.seed,
            "shards": order.size,
            "global_batch_size": order.global_batch_size,
            "micro_batch_size": order.micro_batch_size,
        }

    def _loader(self, start: int) -> Iterable[Read]:
        loading = dict(self.loading)
        workers = loading.pop("num_workers")
        if workers:  # torch deals requests to workers in turn
            workers = max(count for count in range(1, workers + 1) if len(self._own) % count == 0)
        cursors, lengths = self._began
        mine = {lane: cursors.get(lane, (0, 0)) for lane in self._own}
        reader = ShardReader(self.stream, self.shards, mine, lengths, loading.pop("collate", None))
        requests = (Request(step, lane) for step in range(start, self.plan.num_steps) for lane in self._own)
        return batch_loader(reader, requests, workers, **loading)

    def _noted(self, reads: Iterator[Read]) -> Iterator[Read]:
        """Yield `reads`, and note where the lanes are when training takes each."""
        cursors, lengths = self._now
        for read in reads:
            lane, number, offset, ended = read.after
            cursors[lane] = number, offset
            lengths.update(ended)
            yield read


def source(
    dataset: Dataset[Any],
    plan: RunPlan,
    world: World,
    seed: int,
    loading: dict[str, Any],
    order: Order | None = None,
) -> Source:
    """Return a ShardedSource or a Stream for an IterableDataset, else a Source. `order`: of a Source's samples."""
    if isinstance(dataset, ShardedStream):
        return ShardedSource(dataset, plan, world, seed, loading)
    kind = Stream if isinstance(dataset, IterableDataset) else Source
    found = kind(dataset, plan, world, seed, loading)
    found.order = order
    return found


def require_stream_reader() -> None:
    """Raise ConfigError if torchdata, which reads streams, is missing."""
    require("streams", "task.train_dataset: a stream (an IterableDataset)")


def _num_workers(state: dict[str, Any]) -> int:
    """Return the number of workers of the loader that saved this state, in torchdata 0.11's format."""
    main = (state.get("_snapshot") or {}).get("_main_snapshot") or {}
    return int(main.get("_num_workers", 0))


def _digest(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return hashlib.sha256(batch.cpu().reshape(-1).float().numpy().tobytes()).hexdigest()
    if isinstance(batch, dict):
        return _digest(list(batch.values()))
    if isinstance(batch, list | tuple):
        return " ".join(_digest(part) for part in batch)
    return repr(batch)
