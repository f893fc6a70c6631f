"""Checkpoints on disk: one canonical form that every strategy writes and every strategy reads.

What is kept are logical tensors, flattened, under names that no strategy has a part in: `model.<name>` for the module's
parameters and buffers, `optimizer.<key>.<name>` for the optimizer's state of a parameter. Each rank writes the
stretches of them that it holds into a safetensors file of its own; the manifest says which stretch lies where, with
size and SHA-256 of each file. A checkpoint is complete when its manifest is there, and whole when the digests fit.

Why not torch.distributed.checkpoint: docs/decisions/0007-checkpoints-are-stretches.md.
"""

import hashlib
import math
import os
import shutil
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distrib.errors import CheckpointError, ConfigError, MismatchError
from distrib.run_folder.manifest import MANIFEST, read_manifest, sealed, step_of, steps_of

_SMALL = 1 << 14  # elements: what one rank writes alone


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a logical tensor of `shape`: the elements from `offset` on, in C order.

    `copies` ranks hold the same elements, and this rank's is number `copy` of them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: int = 0
    copy: int = 0
    copies: int = 1
    replicated: bool = False  # every rank holds a copy of the whole tensor


@dataclass(frozen=True)
class Part:
    """The stretches that one rank writes."""

    rank: int
    tensors: dict[str, Tensor]  # one-dimensional
    places: dict[str, tuple[tuple[int, ...], int]]  # shape of the whole, offset

    @property
    def file(self) -> str:
        return f"shard-{self.rank:05d}.safetensors"


def named_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The module's parameters and persistent buffers, each by its first name; and the further names of tied ones, with
    the first name of each. Raises ConfigError for what is no tensor."""
    named: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"task.model: {name} in its state_dict is a {type(value).__name__}, no tensor, and would not be saved; "
                "keep it in a buffer, or leave it out of get_extra_state"
            )
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            named[name] = value
            first[id(value)] = name
    return named, tied


def replicated(tensor: Tensor) -> Shard:
    """Of a tensor that is whole on every rank."""
    return Shard(tensor, tuple(tensor.shape), replicated=True)


def part_of(shards: dict[str, Shard], rank: int, world_size: int) -> Part:
    """What `rank` writes. The ranks that hold copies of the same elements cut them evenly, or deal the small ones out
    by name."""
    part = Part(rank, {}, {})
    for name, shard in shards.items():
        flat, offset = shard.tensor.detach().reshape(-1), shard.offset
        copy, copies = (rank, world_size) if shard.replicated else (shard.copy, shard.copies)
        size = flat.numel()
        if not size and 0 not in shard.shape:
            continue
        if size < _SMALL:
            if zlib.crc32(name.encode()) % copies != copy:
                continue
        else:
            first, end = size * copy // copies, size * (copy + 1) // copies
            offset, flat = offset + first, flat[first:end]
        part.tensors[name] = flat
        part.places[name] = (shard.shape, offset)
    return part


def prepare(folder: Path, step: int) -> Path:
    """An empty folder to write into, with what earlier saves left behind removed. Raises CheckpointError."""
    partial = folder / f".step-{step:08d}.partial"
    try:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save a checkpoint: {error.strerror}") from None
    return partial


def write_part(partial: Path, part: Part) -> dict[str, Any]:
    """Write one rank's file; returns what the manifest says of it. Raises CheckpointError where the disk refuses."""
    path = partial / part.file
    try:
        write_file(part.tensors, path)
        return {"file": part.file, "bytes": path.stat().st_size, "sha256": _sha256(path)}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: cannot save the checkpoint: {reason}; earlier ones are untouched") from None


def commit(partial: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> Path:
    """Give the checkpoint its name, when all of it is on disk. Raises CheckpointError, and then it has not got it."""
    folder, final = partial.parent, partial.parent / partial.name.removeprefix(".").removesuffix(".partial")
    try:
        for file in files:
            if (partial / file["file"]).stat().st_size != file["bytes"]:
                raise CheckpointError(f"{partial / file['file']}: not of the size that its rank wrote")
        described = {file["file"]: {"bytes": file["bytes"], "sha256": file["sha256"]} for file in files}
        (partial / MANIFEST).write_text(sealed({**manifest, "files": described}))
        fsync(partial / MANIFEST)
        fsync(partial)
        if final.exists():  # damaged, or of a course that was given up: the step was made again
            final.rename(folder / f".{final.name}.replaced")
        partial.rename(final)
        fsync(folder)
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot save the checkpoint: {error.strerror}; earlier ones are untouched"
        ) from None
    return final


def describe(part: Part) -> dict[str, Any]:
    """What the manifest says of the tensors in a part."""
    return {
        name: {
            "dtype": str(part.tensors[name].dtype).removeprefix("torch."),
            "shape": list(shape),
            "stretches": [[part.file, offset, part.tensors[name].numel()]],
        }
        for name, (shape, offset) in part.places.items()
    }


def merge(described: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's `tensors`, from what each rank describes: stretches of all ranks, in order. Raises CheckpointError
    if they leave a gap, or overlap."""
    tensors: dict[str, Any] = {}
    for part in described:
        for name, entry in part.items():
            tensors.setdefault(name, {**entry, "stretches": []})["stretches"].extend(entry["stretches"])
    for name, entry in tensors.items():
        entry["stretches"].sort(key=lambda stretch: stretch[1])
        ends = [0, *(offset + length for _, offset, length in entry["stretches"])]
        if [offset for _, offset, _ in entry["stretches"]] != ends[:-1] or ends[-1] != math.prod(entry["shape"]):
            raise CheckpointError(f"{name}: the ranks hold it with gaps or overlaps, no checkpoint was saved: {entry}")
    return tensors


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the `keep` newest checkpoints and those at multiples of `keep_every` steps (0: none)."""
    for path in list(steps_of(folder))[keep:]:
        if not keep_every or step_of(path) % keep_every:
            gone = folder / f".{path.name}.deleted"
            try:
                path.rename(gone)  # first absent, then gone: never incomplete
                shutil.rmtree(gone)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot delete an old checkpoint: {error.strerror}") from None


def sync(paths: list[Path]) -> None:
    """Have what was written to these files on disk. Raises CheckpointError."""
    for path in paths:
        try:
            fsync(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}; no checkpoint was saved") from None


def verify(path: Path, rank: int = 0, world_size: int = 1, contents: bool = True) -> dict[str, Any]:
    """The manifest, after comparing every `world_size`-th file with it, or only its size if not the `contents`.

    Raises CheckpointError.
    """
    manifest = read_manifest(path)
    for name, expected in list(manifest["files"].items())[rank::world_size]:
        try:
            whole = (path / name).stat().st_size == expected["bytes"]
            if not whole or (contents and _sha256(path / name) != expected["sha256"]):
                raise CheckpointError(f"{path / name}: damaged: its content is not what the manifest says")
        except OSError as error:
            raise CheckpointError(f"{path / name}: damaged: {error.strerror}") from None
    return manifest


def load(path: Path, manifest: dict[str, Any], shards: dict[str, Shard]) -> None:
    """Read into `shards`, in place, whatever strategy and number of processes wrote. Runs no code from the files.

    Raises MismatchError if the checkpoint is of another model.
    """
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        shared: dict[int, Tensor] = {}  # numbers, by where they go
        for name, shard in shards.items():
            entry = manifest["tensors"].get(name)
            if entry is None or tuple(entry["shape"]) != shard.shape:
                found = "is not there" if entry is None else f"has the shape {entry['shape']}"
                raise MismatchError(
                    f"{path}: of another model: {name} {found}, here it has the shape {list(shard.shape)}"
                )
            values, start = torch.empty(shard.tensor.numel(), dtype=shard.tensor.dtype), shard.offset
            for file, offset, length in entry["stretches"]:
                first, last = max(start, offset), min(start + len(values), offset + length)
                if first < last:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(path / file, framework="pt"))
                    stretch = opened[file].get_slice(name)[first - offset : last - offset]
                    values[first - start : last - start] = stretch
            if values.numel() == 1 and not torch.equal(values, shared.setdefault(shard.tensor.data_ptr(), values)):
                raise MismatchError(
                    f"{path}: {name} is {values.item()}, and has another value for other parameters, of which this "
                    "strategy keeps one for all; go on under the strategy that saved it, or ddp"
                )
            with torch.no_grad():
                shard.tensor.copy_(values.view(shard.tensor.shape))


def write_file(tensors: dict[str, Tensor], path: Path) -> None:
    """On disk when it returns, and readable by whom the process's umask says, which safetensors leaves out."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)
    fsync(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
