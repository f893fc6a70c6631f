"""Checkpoints on disk, in one format that every strategy writes and reads.

A checkpoint holds unsharded tensors, flattened, under names that do not depend on the strategy: `model.<name>` for
parameters and buffers, `optimizer.<key>.<name>` for a parameter's optimizer state, `ema.<name>` for its average. Each
rank writes the slices of them that it holds (called stretches in the manifest) into its own safetensors file. The
manifest lists each slice's file and offset, and each file's size and SHA-256. A checkpoint is complete if it has a
manifest, and valid if the digests match.

Why not torch.distributed.checkpoint: docs/decisions/0007-checkpoints-are-stretches.md.
"""

import math
import os
import shutil
import zlib
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from distrib.errors import CheckpointError, ConfigError, MismatchError
from distrib.run_folder.manifest import MANIFEST, read_manifest, sealed, step_of, steps_of
from distrib.run_folder.tensor_files import TensorFile, open_tensors
from distrib.sha256 import sha256_of

AVERAGE = "ema."  # what the names of averages begin with
_SMALL = 1 << 14  # elements; a smaller replicated tensor is written by one rank


@dataclass(frozen=True)
class Shard:
    """This rank's slice of a tensor of `shape`: consecutive elements in C order, the first at index `offset`.

    `copies` ranks hold the same elements; this rank's copy has the number `copy`.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: int = 0
    copy: int = 0
    copies: int = 1
    replicated: bool = False  # every rank holds a copy of the whole tensor


@dataclass(frozen=True)
class Part:
    """The slices that one rank writes."""

    rank: int
    tensors: dict[str, Tensor]  # one-dimensional
    places: dict[str, tuple[tuple[int, ...], int]]  # shape of the whole tensor, offset of the slice

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
    """Return the shard of a tensor that every rank holds whole."""
    return Shard(tensor, tuple(tensor.shape), replicated=True)


def part_of(shards: dict[str, Shard], rank: int, world_size: int) -> Part:
    """Return what `rank` writes. Ranks that hold copies of the same elements split them evenly; one of them writes a
    small tensor whole."""
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
    """Return an empty folder to write into, and delete what unfinished saves left. Raises CheckpointError."""
    partial = folder / f".step-{step:08d}.partial"
    try:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save a checkpoint: {error.strerror}") from None
    return partial


def write_part(partial: Path, part: Part) -> dict[str, Any]:
    """Write one rank's file, and return its entry for the manifest. Raises CheckpointError if it cannot be written."""
    path = partial / part.file
    try:
        save_file(part.tensors, path)
        finish_file(path)
        return {"file": part.file, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: cannot save the checkpoint: {reason}; earlier ones are untouched") from None


def commit(partial: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> Path:
    """Write the manifest, and rename the folder to its final name when all is on disk. Returns the new path.

    Raises CheckpointError; then the final name does not exist.
    """
    folder, final = partial.parent, partial.parent / partial.name.removeprefix(".").removesuffix(".partial")
    try:
        for file in files:
            if (partial / file["file"]).stat().st_size != file["bytes"]:
                raise CheckpointError(f"{partial / file['file']}: not of the size that its rank wrote")
        described = {file["file"]: {"bytes": file["bytes"], "sha256": file["sha256"]} for file in files}
        (partial / MANIFEST).write_text(sealed({**manifest, "files": described}))
        fsync(partial / MANIFEST)
        fsync(partial)
        if final.exists():  # damaged, or saved before the run was rewound to an earlier step
            final.rename(folder / f".{final.name}.replaced")
        partial.rename(final)
        fsync(folder)
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot save the checkpoint: {error.strerror}; earlier ones are untouched"
        ) from None
    return final


def describe(part: Part) -> dict[str, Any]:
    """Return the manifest's entries for the tensors of a part."""
    return {
        name: {
            "dtype": str(part.tensors[name].dtype).removeprefix("torch."),
            "shape": list(shape),
            "stretches": [[part.file, offset, part.tensors[name].numel()]],
        }
        for name, (shape, offset) in part.places.items()
    }


def merge(described: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the entries of all ranks into the manifest's `tensors`, with slices sorted by offset.

    Raises CheckpointError if slices overlap or leave a gap.
    """
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


def prune(folder: Path, keep: int, keep_every: int, best: Collection[int] = ()) -> None:
    """Delete all but the `keep` newest checkpoints, those at multiples of `keep_every` steps (0: none), and the `best`
    steps'."""
    for path in list(steps_of(folder))[keep:]:
        if (not keep_every or step_of(path) % keep_every) and step_of(path) not in best:
            gone = folder / f".{path.name}.deleted"
            try:
                path.rename(gone)  # first, so that no incomplete checkpoint is visible under its name
                shutil.rmtree(gone)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot delete an old checkpoint: {error.strerror}") from None


def sync(paths: list[Path]) -> None:
    """Sync these files to disk. Raises CheckpointError."""
    for path in paths:
        try:
            fsync(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}; no checkpoint was saved") from None


def verify(path: Path, rank: int = 0, world_size: int = 1, contents: bool = True) -> dict[str, Any]:
    """Check this rank's share of the files (every `world_size`-th) against the manifest, and return the manifest.

    If `contents` is false, only sizes are checked. Raises CheckpointError.
    """
    manifest = read_manifest(path)
    for name, expected in list(manifest["files"].items())[rank::world_size]:
        try:
            whole = (path / name).stat().st_size == expected["bytes"]
            if not whole or (contents and sha256_of(path / name) != expected["sha256"]):
                raise CheckpointError(f"{path / name}: damaged: its content is not what the manifest says")
        except OSError as error:
            raise CheckpointError(f"{path / name}: damaged: {error.strerror}") from None
    return manifest


def load(path: Path, manifest: dict[str, Any], shards: dict[str, Shard]) -> int:
    """Read a checkpoint of any strategy and number of processes into `shards`, in place. Runs no code from the files.

    A manifest that is `partial` has not all of them. Returns the number of bytes read. Raises MismatchError if the
    checkpoint was saved with another model.
    """
    with ExitStack() as stack:
        opened: dict[str, TensorFile] = {}
        shared: dict[int, Tensor] = {}  # scalars, by the address they are copied to
        for name, shard in shards.items():
            entry = manifest["tensors"].get(name)
            if entry is None and manifest.get("partial"):
                continue
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
                        opened[file] = stack.enter_context(open_tensors(path / file))
                    part = values[first - start : last - start]
                    opened[file].read(entry.get("name", name), first - offset, part)
            if values.numel() == 1 and not torch.equal(values, shared.setdefault(shard.tensor.data_ptr(), values)):
                raise MismatchError(
                    f"{path}: {name} is {values.item()}, and has another value for other parameters, but this "
                    "strategy keeps one value for all; resume with the strategy that saved it, or with ddp"
                )
            with torch.no_grad():
                shard.tensor.copy_(values.view(shard.tensor.shape))
        return sum(file.bytes_read for file in opened.values())


def averaged(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the average of the weights in place of the weights. Raises ConfigError if the checkpoint
    has none."""
    tensors = dict(manifest["tensors"])
    for stored in [name for name in tensors if name.startswith(AVERAGE)]:
        first = stored.removeprefix(AVERAGE)
        name = f"model.{manifest['tied'].get(first, first)}"
        tensors[name] = {**tensors[stored], "name": stored, "dtype": tensors[name]["dtype"]}
    if tensors == manifest["tensors"]:
        raise ConfigError(
            f"--weights ema: {path} has no average of the weights, because its run was trained without train.ema; "
            "leave --weights out, or train with train.ema"
        )
    return {**manifest, "tensors": tensors}


def finish_file(path: Path) -> None:
    """Sync a file that safetensors wrote, with the mode that the umask gives to new files: it ignores the umask."""
    probe = path.with_name(f".{path.name}.umask")  # each rank has its own: all of them write into this folder
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()
    fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
