"""`train.compile`: compiles forwards with torch.compile, and keeps the machine code in the run folder.

Only the method `forward` of a module is replaced. The module, its names and its hooks stay the same, so strategies and
checkpoints treat it as before. nn.Module.compile() would also compile the hooks of fully_shard and DeepSpeed.

A forward is compiled as one graph (`fullgraph`). If torch.compile cannot do that, it raises an error that names the
line. By default, torch would silently run a part of the forward, or all of it, uncompiled.
"""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrib.errors import ConfigError
from distrib.processes.world import World

# Dropout draws from torch's generators, as uncompiled code does. So a seed gives the same numbers either way.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


def require_tools(mode: str, world: World) -> None:
    """Raise ConfigError if this machine cannot compile. `mode`: the value of train.compile.

    On a CPU, torch needs a C++ compiler and Python's headers. On an accelerator this is not checked, because torch
    reports in the first step what it lacks.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        raise ConfigError(
            f"train.compile: {mode}, but TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set, so torch would compile "
            "nothing; unset it, or give false"
        )
    if os.environ.get("TORCHDYNAMO_SUPPRESS_ERRORS"):
        raise ConfigError(
            f"train.compile: {mode}, but TORCHDYNAMO_SUPPRESS_ERRORS is set, so torch would go on uncompiled where it "
            "cannot compile; unset it, or give false"
        )
    if not world.use_cpu:
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile: {mode} needs a C++ compiler on a CPU, and there is no {compiler}; install it (Debian: "
            "apt-get install g++), name another in the variable CXX, or give false"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise ConfigError(
            f"train.compile: {mode} needs Python's headers on a CPU, and there is no {headers}/Python.h; install them "
            "(Debian: apt-get install python3-dev), or give false"
        )


def keep_in(folder: Path) -> None:
    """Use `folder` as torch's cache of compiled code from now on.

    All ranks share it. This is safe, because torch writes files atomically, and names them by a digest of their source.
    """
    folder.mkdir(mode=0o700, exist_ok=True)  # this machine code is run, so nobody else may write it
    if not torch.accelerator.is_available():
        _find_vector_instructions()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())
    from torch._inductor.utils import clear_caches  # slow to import

    # Code that this process compiled for an earlier run is in another folder. torch would count it as recompiled.
    torch.compiler.reset()
    clear_caches()


def _find_vector_instructions() -> None:
    """Have torch test which vector instructions this CPU and compiler have, before the cache is the run's folder.

    For the test torch compiles programs into its cache. In its own place, all runs on this machine share them; in a new
    folder they would take most of the time that compiling a small model takes.
    """
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with suppress(OSError):  # that place cannot be written; torch tests again in the run's folder
        valid_vec_isa_list()


def compile_forwards(modules: list[nn.Module]) -> None:
    """Compile the forward of each module on its first call. Equal modules share the compiled code.

    Only calls that record gradients run compiled code. Evaluation runs uncompiled, because its result has the same bits
    on any number of processes. It also has other shapes and another graph, which would be compiled again, and not in
    the same way on every rank.
    """
    for module in modules:
        module.forward = _compiled(module.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, fullgraph=True, options=_OPTIONS)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run
