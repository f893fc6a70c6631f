"""The weights of a checkpoint as one file, for plain torch."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from distrib.errors import CheckpointError, RunDirError
from distrib.state.checkpoint import fsync, load, replicated, verify, write_file

_WEIGHTS = "model.safetensors"


def export(path: Path, folder: Path) -> Path:
    """Write the weights of the checkpoint at `path` to `folder/model.safetensors`, whole or not at all.

    Raises RunDirError where there is such a file, CheckpointError where the checkpoint is damaged or the disk refuses.
    """
    manifest = verify(path)
    final, partial = folder / _WEIGHTS, folder / f".{_WEIGHTS}.partial"
    if final.exists():
        raise RunDirError(f"{final}: is there already; choose another folder with --out")
    weights: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        if name.startswith("model."):
            dtype = getattr(torch, entry["dtype"])
            weights[name.removeprefix("model.")] = torch.empty(entry["shape"], dtype=dtype)
    load(path, manifest, {f"model.{name}": replicated(tensor) for name, tensor in weights.items()})
    weights.update({name: weights[other].clone() for name, other in manifest["tied"].items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(weights, partial)
        partial.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{final}: cannot export the weights: {reason}") from None
    return final
