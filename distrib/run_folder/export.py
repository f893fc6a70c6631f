"""Exports the weights of a checkpoint through `Task.export`, by default into one safetensors file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distrib.errors import CheckpointError, RunDirError
from distrib.processes.world import World
from distrib.run_folder.checkpoint import averaged, finish_file, fsync, load, named_state, replicated, verify
from distrib.run_folder.frozen import FrozenBase
from distrib.task import Task

_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def export(path: Path, folder: Path, task: Task | None = None, ema: bool = False) -> list[Path]:
    """Let the task write the weights of the checkpoint at `path`, or their average, into `folder`, completely or not at
    all.

    Returns the written files. Raises RunDirError if one exists already, CheckpointError if the checkpoint is damaged or
    a file cannot be written, ConfigError if it has no average.
    """
    manifest = _manifest(path, folder, ema)
    weights: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        if name.startswith("model."):
            dtype = getattr(torch, entry["dtype"])
            weights[name.removeprefix("model.")] = torch.empty(entry["shape"], dtype=dtype)
    load(path, manifest, {f"model.{name}": replicated(tensor) for name, tensor in weights.items()})
    weights.update({name: weights[other] for name, other in manifest["tied"].items()})
    return _write(folder, lambda partial: (task or Task()).export(weights, partial))


def export_over(module: nn.Module, path: Path, folder: Path, write: Callable[[Path], None], ema: bool) -> list[Path]:
    """Load a checkpoint without its frozen base over the module that `Task.model` built, and `write` it to `folder`, as
    `export` does. Raises MismatchError too, if the base is another."""
    manifest, frozen = _manifest(path, folder, ema), FrozenBase.of(module, World()) or FrozenBase({})
    named, left_out = named_state(module)[0], set(frozen.names(module))
    shards = {f"model.{name}": replicated(tensor) for name, tensor in named.items() if name not in left_out}
    load(path, manifest, frozen.loaded(path, manifest, module, shards))
    return _write(folder, write)


def _manifest(path: Path, folder: Path, ema: bool) -> dict[str, Any]:
    manifest = verify(path)
    if ema:
        manifest = averaged(path, manifest)
    for name in _WEIGHTS:
        _require_new(folder / name)
    return manifest


def _write(folder: Path, write: Callable[[Path], None]) -> list[Path]:
    partial = folder / ".export.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        return _move(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{folder}: cannot export the weights: {reason}") from None


def _move(partial: Path, folder: Path) -> list[Path]:
    """Move the files from `partial` to `folder`, weights last, because no program loads the folder without them."""
    files = sorted(partial.iterdir(), key=lambda file: (file.name.startswith(("model", "adapter_model")), file.name))
    for file in files:
        _require_new(folder / file.name)
    for file in files:
        finish_file(file)
    for file in files:
        file.rename(folder / file.name)
    partial.rmdir()
    fsync(folder)
    return [folder / file.name for file in files]


def _require_new(file: Path) -> None:
    if file.exists():
        raise RunDirError(f"{file}: exists already; choose another folder with --out")
