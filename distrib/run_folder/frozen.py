"""Frozen parameters that checkpoints leave out, because `Task.model` builds them again: the model under an adapter.

The manifest has their names and one digest of their values. A checkpoint is only read over the same values. Why it is
so: docs/decisions/0032-checkpoints-leave-out-the-frozen-base.md.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrib.errors import MismatchError
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard, named_state

KEY = "frozen"  # of the manifest
_MARK = "distrib_leaves_out"
_THREADS = 4  # hashlib releases the interpreter lock


def leave_out(parameters: Iterable[nn.Parameter]) -> None:
    """Leave these parameters out of checkpoints, while they are frozen. What builds them must build the same again."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)


class FrozenBase:
    """The parameters of a module that were given to `leave_out`, and the digests of their values."""

    def __init__(self, digests: dict[str, str]) -> None:
        self._digests = digests  # by name

    @classmethod
    def of(cls, module: nn.Module, world: World) -> "FrozenBase | None":
        """Return that of a module as it was built, before it is spread over the ranks; None if it has none. Collective.

        The values of rank 0 count.
        """
        named, _ = named_state(module)
        marked = {name: tensor for name, tensor in named.items() if hasattr(tensor, _MARK)}
        return cls(world.on_rank_0(lambda: _digests(marked))) if marked else None

    def names(self, module: nn.Module) -> list[str]:
        """Return the names of those that are frozen now. `module`: the same one, as it is spread over the ranks."""
        named, _ = named_state(module)
        return [name for name in self._digests if not named[name].requires_grad]

    def record(self, module: nn.Module) -> dict[str, Any]:
        """Return what a manifest has of them: nothing if no parameter is left out."""
        names = self.names(module)
        return {KEY: {"names": names, "sha256": self._digest(names)}} if names else {}

    def loaded(
        self, path: Path, manifest: dict[str, Any], module: nn.Module, shards: dict[str, Shard]
    ) -> dict[str, Shard]:
        """Return those of the `shards` that the checkpoint at `path` holds, or should.

        Raises MismatchError if it was saved over other frozen values, or holds values for what is frozen here.
        """
        for name in self.names(module):
            if f"model.{name}" in manifest["tensors"]:
                raise MismatchError(
                    f"{path}: holds {name}, which is frozen under an adapter here and comes from Task.model(); give "
                    "the weights to that (task.model), or train it in both runs"
                )
        record = manifest.get(KEY)
        if record is None:
            return shards
        names = record["names"]
        if missing := [name for name in names if name not in self._digests]:
            raise MismatchError(
                f"{path}: of another model: it was saved without {missing[0]}, which was frozen under an adapter, and "
                "is not here"
            )
        if self._digest(names) != record["sha256"]:
            raise MismatchError(
                f"{path}: holds an adapter for another base: the values of the {len(names)} frozen parameters that "
                "Task.model() builds are not those that it was trained on; give the same base model"
            )
        return {key: shard for key, shard in shards.items() if key.removeprefix("model.") not in names}

    def _digest(self, names: Iterable[str]) -> str:
        text = "".join(f"{name} {self._digests[name]}\n" for name in sorted(names))
        return hashlib.sha256(text.encode()).hexdigest()


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(tensors, threads.map(_digest_of, tensors.values()), strict=True))


def _digest_of(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and values."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(values.data)
    return found.hexdigest()
