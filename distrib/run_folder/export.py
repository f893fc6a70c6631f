"""Exports the weights of a checkpoint through `Task.export`, by default into one safetensors file."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from distrib.errors import CheckpointError, RunDirError
from distrib.run_folder.checkpoint import averaged, finish_file, fsync, load, replicated, verify
from distrib.task import Task, method_of

_WEIGHTS = "model.safetensors"


def export(path: Path, folder: Path, task: Task | None = None, ema: bool = False) -> list[Path]:
    """Let the task write the weights of the checkpoint at `path`, or their average, into `folder`, completely or not at
    all.

    Returns the written files. Raises RunDirError if one exists already, CheckpointError if the checkpoint is damaged or
    a file cannot be written, ConfigError if it has no average.
    """
    manifest = verify(path)
    if ema:
        manifest = averaged(path, manifest)
    _require_new(folder / _WEIGHTS)
    weights: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        if name.startswith("model."):
            dtype = getattr(torch, entry["dtype"])
            weights[name.removeprefix("model.")] = torch.empty(entry["shape"], dtype=dtype)
    load(path, manifest, {f"model.{name}": replicated(tensor) for name, tensor in weights.items()})
    weights.update({name: weights[other] for name, other in manifest["tied"].items()})
    partial = folder / ".export.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        method_of(task or Task(), "export")(weights, partial)
        return _move(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{folder}: cannot export the weights: {reason}") from None


def _move(partial: Path, folder: Path) -> list[Path]:
    """Move the files from `partial` to `folder`, weights last, because no program loads the folder without them."""
    files = sorted(partial.iterdir(), key=lambda file: (file.name.startswith("model"), file.name))
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
