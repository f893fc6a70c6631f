"""What environment.json says: by what, where and with which code a run was started."""

import hashlib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrib.data.fingerprint import sample_print
from distrib.processes.world import World, versions
from distrib.run_folder.ledger import now
from distrib.task import Task

_LONGEST = 200  # characters of an argument that environment.json shows; of longer ones it has a digest


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
    file = source_file(of)
    try:
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
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
    """The file that a class stands in; None if it was made in an interactive session."""
    try:
        return inspect.getfile(of)
    except (OSError, TypeError):
        return None


def _class_name(of: type) -> str:
    file = source_file(of)
    module = Path(file).stem if of.__module__ == "__main__" and file is not None else of.__module__
    return f"{module}:{of.__qualname__}"


def _arguments(task: Task) -> dict[str, Any]:
    """What the class was called with, by the names of its parameters."""
    args, kwargs = task._given
    try:
        bound = inspect.signature(type(task)).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a class with a __new__ of its own
        return {}
    bound.apply_defaults()
    return {name: _plain(value) for name, value in bound.arguments.items()}


def _plain(value: Any) -> Any:
    """Numbers as they are; a digest of text, which may be a secret, and of what is long; of other things the type."""
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
