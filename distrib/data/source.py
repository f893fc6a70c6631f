"""Where a run's windows come from: a dataset with a length, of which the position is all there is to know, or a stream,
whose state is saved with the run."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from distrib.data.loader import DevicePrefetcher, Read, Window, data_loader, train_windows
from distrib.data.sampler import DistributedSampler, MicroBatch
from distrib.errors import CheckpointError, ConfigError
from distrib.extras import require
from distrib.plan import RunPlan
from distrib.processes.lifetimes import shield_worker, stop_signals_held
from distrib.processes.world import World


class Source:
    """A dataset with `__len__`: the same global batches for any number of processes."""

    def __init__(self, dataset: Dataset[Any], plan: RunPlan, world: World, seed: int, loading: dict[str, Any]) -> None:
        """`loading` as for `data_loader`."""
        self.dataset, self.plan, self.world, self.seed, self.loading = dataset, plan, world, seed, loading

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        """One for each step from `start` to the end of the run; with a `prefetcher` their batches are on the
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
        )
        return train_windows(sampler, prefetcher, **self.loading)

    def some_batch(self) -> Any:
        """A micro-batch of the first samples, to see what one looks like; None if it cannot be read twice."""
        first = np.arange(self.plan.micro_batch_size, dtype=np.uint64)
        # If the run has workers, one of them reads: they must not share a file that the dataset opens in this process.
        workers = min(1, self.loading["num_workers"])
        loader = data_loader(self.dataset, [MicroBatch(first, first)], seed=self.seed, num_workers=workers)
        return next(iter(loader)).batch

    def state(self) -> list[Any] | None:
        """What a checkpoint keeps, from all ranks: nothing. Collective."""
        return None

    def load(self, state: list[Any] | None) -> None:
        """Go on from it."""


class Stream(Source):
    """An IterableDataset. Each rank reads its own, through torchdata's StatefulDataLoader; its state is saved a rank.

    `train_dataset()` gives each rank its own samples (World.detect() says which it is), and each of its workers.
    """

    _loader: Any = None
    _state: dict[str, Any] | None = None

    def __init__(self, dataset: Dataset[Any], plan: RunPlan, world: World, seed: int, loading: dict[str, Any]) -> None:
        """As for Source. Raises ConfigError if torchdata is missing."""
        require_stream_reader()
        super().__init__(dataset, plan, world, seed, loading)

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        """Never with the prefetcher: the state of a stream is where it was read to."""
        reads = self._reads(start)
        length = self.plan.grad_accum_steps
        for step in range(start, self.plan.num_steps):
            yield Window(step, self.world.rank * length, length, reads)

    def some_batch(self) -> Any:
        return None

    def state(self) -> list[Any] | None:
        mine = self._loader.state_dict()
        try:
            json.dumps(mine)
        except TypeError as error:
            name = type(self.dataset).__name__
            raise CheckpointError(
                f"task.train_dataset: the state_dict() of {name} cannot be saved as JSON: {error}"
            ) from None
        return self.world.all_gather_object(mine)

    def load(self, state: list[Any] | None) -> None:
        saved = len(state or [])
        if saved != self.world.world_size:
            raise ConfigError(
                f"task.train_dataset: {type(self.dataset).__name__} is a stream, of which {saved} process(es) had read "
                f"their part; {self.world.world_size} cannot take over from them, start {saved}"
            )
        assert state is not None, "as many as ranks"
        mine = state[self.world.rank]
        workers, before = self.loading["num_workers"], _num_workers(mine)
        if workers != before:
            raise ConfigError(
                f"data.num_workers: {workers}, but the stream {type(self.dataset).__name__} was read by {before} "
                f"worker(s), each of which has its own place in it; give {before}"
            )
        self._state = mine

    def _reads(self, start: int) -> Iterator[Read]:
        """Micro-batches without end: where the stream ends, it begins again."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own affair
        size, per_rank = self.plan.micro_batch_size, self.plan.grad_accum_steps
        options = {**self.loading, "worker_init_fn": shield_worker}
        if not options["num_workers"]:
            options.update(prefetch_factor=None, worker_init_fn=None)
        self._loader = StatefulDataLoader(self.dataset, size, drop_last=True, **options)
        if self._state is not None:
            self._loader.load_state_dict(self._state)
        number, empty = start * per_rank, 0
        while empty < 2:  # once it may have just ended
            empty += 1
            with stop_signals_held():  # until its workers leave them to this process
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
        """Ranks that begin with the same samples would go on with the same."""
        digests = self.world.all_gather_object(_digest(batch))
        for rank, digest in enumerate(digests):
            if (other := digests.index(digest)) != rank:
                raise ConfigError(
                    f"task.train_dataset: ranks {other} and {rank} read the same samples of the stream; split it, "
                    "World.detect() says rank and world_size"
                )


def source(dataset: Dataset[Any], plan: RunPlan, world: World, seed: int, loading: dict[str, Any]) -> Source:
    """Of whichever kind the dataset is."""
    kind = Stream if isinstance(dataset, IterableDataset) else Source
    return kind(dataset, plan, world, seed, loading)


def require_stream_reader() -> None:
    """Raises ConfigError if the library that reads streams is missing."""
    require("streams", "task.train_dataset: a stream (an IterableDataset)")


def _num_workers(state: dict[str, Any]) -> int:
    """The workers of the loader that made this state, as torchdata 0.11 writes it; without workers it names none."""
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
