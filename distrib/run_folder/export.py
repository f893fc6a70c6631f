"""Exports the weights of a checkpoint through `Task.export`, by default into one safetensors file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distrib.errors import CheckpointError, ConfigError, RunDirError
from distrib.processes.world import World
from distrib.run_folder.checkpoint import averaged, finish_file, fsync, load, named_state, replicated, verify
from distrib.run_folder.frozen import KEY, FrozenBase
from distrib.run_folder.manifest import part_of
from distrib.task import Task, method_of

_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"


def export(path: Path, folder: Path, task: Task | None = None, ema: bool = False) -> list[Path]:
    """Let the task write the weights of the checkpoint at `path`, or their average, into `folder`, completely or not at
    all. Each model of an OwnLoop becomes a file NAME.safetensors.

    Returns the written files. Raises RunDirError if one exists already, CheckpointError if the checkpoint is damaged or
    a file cannot be written, ConfigError if it has no average.
    """
    manifest = verify(path)
    if ema:
        manifest = averaged(path, manifest)
    models = manifest.get("engines", {})
    for name in models or ["model"]:
        _require_new(folder / f"{name}.safetensors")
    for name, engine in models.items():
        if KEY in engine:
            raise ConfigError(f"{path}: has an adapter of {name} alone; the base model is in the script of the run")

    def write(partial: Path) -> None:
        if not models:
            method_of(task or Task(), "export")(_weights(path, manifest), partial)
        for name in models:
            of_one = partial / ".one"
            of_one.mkdir()
            Task().export(_weights(path, part_of(manifest, name)), of_one)
            (of_one / _WEIGHTS).rename(partial / f"{name}.safetensors")
            of_one.rmdir()

    return _write(folder, write)


def export_over(module: nn.Module, path: Path, folder: Path, write: Callable[[Path], None], ema: bool) -> list[Path]:
    """Load a checkpoint without its frozen base over the module that `Task.model` built, and `write` it to `folder`, as
    `export` does. Raises MismatchError too, if the base is another."""
    manifest = verify(path)
    if ema:
        manifest = averaged(path, manifest)
    for name in (_WEIGHTS, _ADAPTER):
        _require_new(folder / name)
    frozen = FrozenBase.of(module, World()) or FrozenBase({})
    named, left_out = named_state(module)[0], set(frozen.names(module))
    shards = {f"model.{name}": replicated(tensor) for name, tensor in named.items() if name not in left_out}
    load(path, manifest, frozen.loaded(path, manifest, module, shards))
    return _write(folder, write)


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


def _weights(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights by their names in the module's state_dict."""
    weights: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        if name.startswith("model."):
            dtype = getattr(torch, entry["dtype"])
            weights[name.removeprefix("model.")] = torch.empty(entry["shape"], dtype=dtype)
    load(path, manifest, {f"model.{name}": replicated(tensor) for name, tensor in weights.items()})
    weights.update({name: weights[other] for name, other in manifest["tied"].items()})
    return weights


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
