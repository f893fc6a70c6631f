"""The weights of a checkpoint in the form that its task gives them, by default one file for plain torch."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from distrib.errors import CheckpointError, RunDirError
from distrib.run_folder.checkpoint import fsync, load, replicated, verify
from distrib.task import Task

_WEIGHTS = "model.safetensors"


def export(path: Path, folder: Path, task: Task | None = None) -> list[Path]:
    """Have the task write the weights of the checkpoint at `path` to `folder`, whole or not at all; returns its files.

    Raises RunDirError where there is such a file, CheckpointError where the checkpoint is damaged or the disk refuses.
    """
    manifest = verify(path)
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
        (task or Task()).export(weights, partial)
        return _take(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{folder}: cannot export the weights: {reason}") from None


def _take(partial: Path, folder: Path) -> list[Path]:
    """Move what is written to where it belongs, the weights last: without them the folder is read by nobody."""
    files = sorted(partial.iterdir(), key=lambda file: (file.name.startswith("model"), file.name))
    for file in files:
        _require_new(folder / file.name)
    probe = partial / ".umask"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in files:
        file.chmod(mode)  # readable by whom the process's umask says, which safetensors leaves out
        fsync(file)
    for file in files:
        file.rename(folder / file.name)
    partial.rmdir()
    fsync(folder)
    return [folder / file.name for file in files]


def _require_new(file: Path) -> None:
    if file.exists():
        raise RunDirError(f"{file}: is there already; choose another folder with --out")
