"""Reads and writes a checkpoint's manifest, which ends with a digest of its own text, and lists checkpoints."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError, DamagedFileError, MismatchError
from distrib.run_folder.files import parse, read_bytes
from distrib.run_folder.formats import MANIFEST as FORM

MANIFEST = "manifest.json"
_SEAL = re.compile(rb'^(.*),"sha256":"([0-9a-f]{64})"}\n$', re.DOTALL)


def sealed(manifest: dict[str, Any]) -> str:
    """Return the manifest as JSON. Its last key, `sha256`, is the SHA-256 of the text without that key."""
    text = json.dumps(manifest, separators=(",", ":"))
    return f'{text[:-1]},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in this folder. Raises CheckpointError if it is missing or damaged."""
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise CheckpointError(f"{path}: damaged: {MANIFEST} is missing")
    try:
        found = _SEAL.match(read_bytes(file))
        if found is None or hashlib.sha256(found[1] + b"}").hexdigest().encode() != found[2]:
            raise CheckpointError(f"{file}: damaged: its content is not what was written")
        return parse(found[1] + b"}", FORM, file)
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from None


def part_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the manifest of one model's part of an OwnLoop's checkpoint. Raises MismatchError if it has no such
    model."""
    engines = manifest.get("engines", {})
    if name not in engines:
        known = ", ".join(engines) or "none: it is not of an OwnLoop"
        raise MismatchError(f"the checkpoint has no model {name!r}; it has {known}")
    own = {key: entry for key, entry in manifest["tensors"].items() if key.startswith(f"{name}/")}
    tensors = {key.removeprefix(f"{name}/"): {**entry, "name": key} for key, entry in own.items()}
    return {**manifest, **engines[name], "tensors": tensors}


def step_of(path: Path) -> int:
    """Return the number of steps done when the checkpoint was saved, from its name."""
    return int(path.name.removeprefix("step-"))


def steps_of(folder: Path) -> Iterator[Path]:
    """Yield all checkpoints in `folder`, valid or not, newest first. Raises CheckpointError if it cannot be read."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    yield from sorted(
        (folder / name for name in names if re.fullmatch(r"step-[0-9]+", name)), key=step_of, reverse=True
    )


def files_saved(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """Return the newest checkpoint with copies of its run's small files, and these as `{name: text}`; None if none has.

    The copies are in the manifest, so the checkpoint's tensors are not checked.
    """
    try:
        for path in steps_of(folder):
            try:
                if files := read_manifest(path).get("run"):
                    return path, files
            except CheckpointError:
                continue
    except CheckpointError:
        pass
    return None
