"""Weights on disk: model.safetensors and a manifest with sizes and SHA-256, complete or absent."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distrib.errors import CheckpointError, RunDirError

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"


def save(folder: Path, state: dict[str, Tensor], step: int, chain: str) -> Path:
    """Write `folder/step-00000200`. The final name appears only when all of it is on disk.

    `state` holds whole tensors by the module's own names; `chain` is the ledger's at this step. Raises CheckpointError
    where the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_unshared(state), partial / _WEIGHTS)
        files = {_WEIGHTS: {"bytes": (partial / _WEIGHTS).stat().st_size, "sha256": _sha256(partial / _WEIGHTS)}}
        manifest = {"step": step, "chain": chain, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        partial.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: cannot save the checkpoint: {error}; earlier ones are untouched") from None
    return final


def newest(folder: Path) -> Path:
    """The newest checkpoint in `folder`. Raises CheckpointError where there is none."""
    found = sorted(folder.glob("step-*"), key=lambda path: path.name)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint there; the run has not reached its end")
    return found[-1]


def load(path: Path, module: nn.Module) -> dict[str, Any]:
    """Read the weights into `module` and return the manifest. Runs no code from the files.

    Raises CheckpointError where a file is missing, damaged or of another model.
    """
    manifest = _verify(path)
    try:
        module.load_state_dict(load_file(path / _WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: the weights are not those of this model: {reason}") from None
    return manifest


def export(path: Path, folder: Path) -> Path:
    """Copy the weights of the checkpoint at `path` to `folder/model.safetensors`, whole or not at all.

    Raises RunDirError where there is such a file, CheckpointError where the checkpoint is damaged or the disk refuses.
    """
    _verify(path)
    final = folder / _WEIGHTS
    partial = folder / f".{_WEIGHTS}.partial"
    if final.exists():
        raise RunDirError(f"{final}: is there already; choose another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / _WEIGHTS, partial)
        _fsync(partial)
        partial.rename(final)
        _fsync(folder)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot export the weights: {error.strerror}") from None
    return final


def _verify(path: Path) -> dict[str, Any]:
    """The manifest, after comparing all files with it."""
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name}: damaged: its content is not what the manifest says")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from None
    return manifest


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each name with memory of its own, which the format asks for: tied weights stand there under all their names."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        address = value.untyped_storage().data_ptr()
        result[name] = value.clone() if address in seen else value.contiguous()
        seen.add(address)
    return result


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
