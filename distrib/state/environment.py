"""What environment.json says: by what, where and with which code a run was started."""

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from distrib.state.ledger import now
from distrib.task import Task
from distrib.world import World, versions


def describe(
    world: World,
    strategy: str,
    num_samples: int | None,
    task: Task,
    work: dict[str, float],
) -> dict[str, Any]:
    """At the first start; later ones are put behind it in `starts`. `work`: FLOPs of a step, what devices can do."""
    code, packages = identity(task), versions()
    machine = {
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": str(world.device),
        "threads": torch.get_num_threads(),
    }
    start = {
        "time": now(),
        "launcher": world.launcher,
        "job": world.job,
        "hosts": sorted(set(world.hosts)),
        "world_size": world.world_size,
        "strategy": strategy,
        "python": sys.executable,
        "code": code,
        "versions": packages,
        "machine": machine,
        **work,
    }
    return {
        "versions": packages,
        "machine": machine,
        "git_commit": code["git_commit"],
        "training_samples": num_samples,
        "starts": [start],
    }


def identity(task: Task | None) -> dict[str, str | None]:
    """`git_commit`; `uncommitted`, of what is changed since; `task`, of the file that the task's class stands in.

    git is asked of the working directory, where the user's task lies. The last two are SHA-256. None where there is no
    checkout, or nothing to hash.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("diff", "--binary", "--no-ext-diff", "HEAD")
    if commit is not None and changes is None:  # it took too long
        uncommitted: str | None = "unknown"
    else:
        uncommitted = hashlib.sha256(changes).hexdigest() if changes else None
    return {
        "git_commit": None if commit is None else commit.decode().strip(),
        "uncommitted": uncommitted,
        "task": None if task is None else _source(type(task)),
    }


def _source(of: type) -> str | None:
    try:
        return hashlib.sha256(Path(inspect.getfile(of)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # made in an interactive session
        return None


def _git(*arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
