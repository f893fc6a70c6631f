"""The content of environment.json: the launcher, machine, library versions and code of each start."""

import hashlib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distrib.data.fingerprint import sample_print
from distrib.processes.versions import versions
from distrib.processes.world import World
from distrib.run_folder.ledger import now
from distrib.sha256 import sha256_of
from distrib.task import Task

_LONGEST = 200  # characters; of a longer task argument, environment.json has a digest


class Named(Protocol):
    """A Strategy, of which this file must not know more."""

    name: str


def describe(
    world: World,
    strategy: Named,
    num_samples: int | None,
    task: Task | None,
    work: dict[str, float],
) -> dict[str, Any]:
    """Return environment.json for a first start. RunDir appends later starts to `starts`.

    `num_samples`: of the training set, None for a stream. `task`: None for a loop of one's own.
    `work`: FLOPs of a step, and peak FLOP/s of the devices.
    """
    code, packages = identity(task), versions()
    if not type(strategy).__module__.startswith("distrib."):
        code["strategy"] = _source_digest(type(strategy))
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
        "strategy": strategy.name,
        "python": sys.executable,
        "directory": os.getcwd(),
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
    """Return what identifies the code: `git_commit`, `uncommitted` and `task`.

    `git_commit`: of the working directory. `uncommitted`: SHA-256 of the changes since that commit; "unknown" if git
    took too long. `task`: SHA-256 of the file that defines the task's class. A value is None if there is no git
    repository, or nothing to hash.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("diff", "--binary", "--no-ext-diff", "HEAD")
    if commit is not None and changes is None:  # git timed out
        uncommitted: str | None = "unknown"
    else:
        uncommitted = hashlib.sha256(changes).hexdigest() if changes else None
    return {
        "git_commit": None if commit is None else commit.decode().strip(),
        "uncommitted": uncommitted,
        "task": None if task is None else _source_digest(type(task)),
    }


def _source_digest(of: type) -> str | None:
    file = source_file(of)
    try:
        return None if file is None else sha256_of(Path(file))
    except OSError:
        return None


def describe_task(task: Task, module: nn.Module) -> dict[str, Any]:
    """Return the `task` of environment.json."""
    return {
        "class": _class_name(type(task)),
        "file": source_file(type(task)),
        "arguments": _arguments(task),
        "parameters": {name: list(parameter.shape) for name, parameter in module.named_parameters()},
    }


def source_file(of: type) -> str | None:
    """Return the file that defines a class; None for a class from an interactive session."""
    try:
        return inspect.getfile(of)
    except (OSError, TypeError):
        return None


def _class_name(of: type) -> str:
    file = source_file(of)
    module = Path(file).stem if of.__module__ == "__main__" and file is not None else of.__module__
    return f"{module}:{of.__qualname__}"


def _arguments(task: Task) -> dict[str, Any]:
    """Return the arguments the task was constructed with, by parameter name."""
    args, kwargs = task._given
    try:
        bound = inspect.signature(type(task)).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the class defines its own __new__
        return {}
    bound.apply_defaults()
    return {name: _plain(value) for name, value in bound.arguments.items()}


def _plain(value: Any) -> Any:
    """Return numbers unchanged, a digest of strings (they may be secret) and of long values, else the type's name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | os.PathLike):
        return _digest(os.fspath(value))
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return sample_print(value)
    if isinstance(value, dict):
        plain: Any = {str(key): _plain(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        plain = [_plain(item) for item in value]
    else:
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}:{named.__qualname__}"
    text = json.dumps(plain)
    return plain if len(text) <= _LONGEST else _digest(text)


def _digest(text: str | bytes) -> str:
    return "sha256:" + hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def _git(*arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
