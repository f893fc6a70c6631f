"""`train.compile`: forwards made faster by torch.compile, and their machine code kept in the run's folder.

A forward is replaced where it stands. The module, its names and its hooks stay what they are, so that what wraps,
shards and saves it does not notice; nn.Module.compile() would compile the hooks of fully_shard and DeepSpeed, too.

Each is compiled whole or not at all (`fullgraph`): what torch.compile cannot do is an error that names the line, where
torch by itself would go on uncompiled, in whole or in part, without a word.
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

# Dropout draws from torch's generators, as it does uncompiled: what a seed means does not depend on this.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


def require_tools(mode: str, world: World) -> None:
    """Raises ConfigError where this machine cannot compile as `mode` asks. For a CPU torch needs a C++ compiler and
    Python's headers; what it needs for an accelerator it says itself, in the first step."""
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
    """What this process compiles from now on lies in `folder`, and what lies there is not compiled again.

    Ranks share it: torch writes whole files under the digest of what they were made from.
    """
    folder.mkdir(mode=0o700, exist_ok=True)  # machine code that is run: nobody else may write it
    if not torch.accelerator.is_available():
        _find_vector_instructions()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())
    from torch._inductor.utils import clear_caches  # takes its time to import

    # What an earlier run of this process compiled lies in another folder, and would count as recompiled.
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
    """Compile the forward of each on its first call; those of equal modules are compiled once.

    Only where gradients are recorded. Evaluation stays as it is: it has the same bits on any number of processes, and
    its shapes and its graph are others, which would be compiled again, on some ranks otherwise than on others.
    """
    for module in modules:
        module.forward = _compiled(module.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, fullgraph=True, options=_OPTIONS)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run
