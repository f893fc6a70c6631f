"""What must be the same for all ranks before they train: the config, and the run folder."""

import hashlib
import time
from pathlib import Path

from distrib.config import Config
from distrib.errors import ConfigError, RunDirError
from distrib.world import World

_SECONDS_TO_APPEAR = 30.0  # network file systems show new files late


def require_same_config(world: World, config: Config) -> None:
    """Raises ConfigError on every rank, naming the first one whose config is not rank 0's. Collective."""
    mine = config.flat()
    expected = world.on_rank_0(lambda: mine)
    differing = [
        f"{key} is {mine.get(key)!r}, there {expected.get(key)!r}"
        for key in sorted(expected.keys() | mine.keys())
        if expected.get(key) != mine.get(key)
    ]
    for name, found in world.from_all((world.name, "; ".join(differing))):
        if found:
            raise ConfigError(f"{name} has another config than rank 0 on {world.hosts[0]}: {found}; give all the same")


def require_shared(world: World, written: Path) -> None:
    """Raises RunDirError on every rank, naming the first one that does not see what rank 0 wrote there. Collective."""
    digest = world.on_rank_0(lambda: _digest(written))
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (seen := _digest(written) == digest) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name, path, sees in world.from_all((world.name, written.absolute(), seen)):
        if not sees:
            raise RunDirError(
                f"{name} does not see {path} as rank 0 on {world.hosts[0]} wrote it; the run folder must "
                "lie on a file system that all nodes share, choose one with --run-dir"
            )


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
