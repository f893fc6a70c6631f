"""Weights on disk: model.safetensors and a manifest with sizes and SHA-256, complete or absent."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from distrib.errors import CheckpointError

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"


def save(folder: Path, module: nn.Module, step: int, chain: str) -> Path:
    """Write `folder/step-00000200`. The final name appears only when all of it is on disk.

    `chain` is the ledger's at this step. Raises CheckpointError where the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(module, str(partial / _WEIGHTS))
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
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name}: damaged: its content is not what the manifest says")
        load_model(module, str(path / _WEIGHTS))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from None
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: the weights are not those of this model: {reason}") from None
    return manifest


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
