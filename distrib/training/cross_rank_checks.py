"""Checks before training that all ranks have the same config, the same data and the same run folder."""

import hashlib
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.config import Config
from distrib.data.prints import Fingerprint
from distrib.errors import ConfigError, DamagedFileError, DistribError, RunDirError, TrainingError
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard
from distrib.run_folder.files import read_bytes
from distrib.run_folder.identity import difference

_SECONDS_TO_APPEAR = 30.0  # a network file system may show a new file late


def require_same_config(world: World, config: Config) -> None:
    """Raise ConfigError on every rank if a rank's config differs from rank 0's. Collective."""
    mine = config.flat()
    expected = world.on_rank_0(lambda: mine)
    differing = [
        f"{key} is {mine.get(key)!r}, there {expected.get(key)!r}"
        for key in sorted(expected.keys() | mine.keys())
        if expected.get(key) != mine.get(key)
    ]
    for name, found in world.all_gather_object((world.name, "; ".join(differing))):
        if found:
            raise ConfigError(f"{name} has another config than rank 0 on {world.hosts[0]}: {found}; give all the same")


def on_each_machine(world: World, work: Callable[[], None]) -> None:
    """Run `work` on rank 0, and then on local rank 0 of each other machine, while the others wait without a timeout.

    A DistribError from `work` is raised on all ranks. Collective.
    """
    if world.control is None:
        work()
        return
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    for my_turn in (world.is_rank_0, not world.is_rank_0 and world.local_rank == 0):
        outcome: DistribError | None = None
        if my_turn:
            try:
                work()
            except DistribError as error:
                outcome = error
        outcomes: list[Any] = [None] * world.world_size
        dist.all_gather_object(outcomes, outcome, group=patient)
        for found in outcomes:
            if found is not None:
                raise found
    dist.destroy_process_group(patient)


def require_same_data(world: World, data: dict[str, Fingerprint | None]) -> None:
    """Raise ConfigError on every rank if a rank's data differ from rank 0's. Collective."""
    expected = world.on_rank_0(lambda: data)
    reference = f"on rank 0 on {world.hosts[0]}"
    mine = {name: difference(found, expected[name], reference) for name, found in data.items()}
    for who, differing in world.all_gather_object((world.name, mine)):
        for name, found in differing.items():
            if found is not None:
                raise ConfigError(
                    f"{who}: task.{name} {found}; return the whole set on every rank, distrib splits it; "
                    "draw from random, numpy.random or torch, which are seeded; write files in Task.prepare()"
                )


def require_same_rates(world: World, updates: list[int], rate: Callable[[int, float], float]) -> None:
    """Raise ConfigError on every rank if a rank has another learning rate than rank 0 for one of these updates.
    Collective."""
    expected, *others = world.all_gather_object((world.name, [rate(update, 0.0) for update in updates]))
    for name, rates in others:
        for update, first, other in zip(updates, expected[1], rates, strict=True):
            if other != first:
                raise ConfigError(
                    f"task.learning_rate: returned {first!r} for update {update} on {expected[0]}, and {other!r} on "
                    f"{name}; return a function of update and num_updates alone"
                )


def require_same_copies(world: World, strategy: str, shards: dict[str, Shard]) -> None:
    """Raise TrainingError on every rank if a tensor that all ranks hold whole is not the same on all. Collective.

    `strategy`: its name. `shards`: those that a checkpoint is made of.
    """
    mine = {name: _digest_of(shard.tensor) for name, shard in shards.items() if shard.replicated}
    expected, *others = world.all_gather_object(mine)
    for rank, found in enumerate(others, 1):
        for name, digest in found.items():
            if digest != expected.get(name):
                raise TrainingError(
                    f"{strategy}: {name} differs between rank 0 and rank {rank}, but its shard says that all "
                    "ranks hold a copy; sum the gradients over the ranks in the last backward, or override shard_of"
                )


def _digest_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def require_shared(world: World, written: Path) -> None:
    """Raise RunDirError on every rank if a rank does not see the file that rank 0 has written. Collective."""
    digest = world.on_rank_0(lambda: _digest(written))
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (seen := _digest(written) == digest) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name, path, sees in world.all_gather_object((world.name, written.absolute(), seen)):
        if not sees:
            raise RunDirError(
                f"{name} does not see {path} as rank 0 on {world.hosts[0]} wrote it; the run folder must "
                "be on a file system that all nodes share, choose one with --run-dir"
            )


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except DamagedFileError:
        return None
