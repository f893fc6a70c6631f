"""A checkpoint's manifest: what it holds, sealed by a digest of its own text; and which checkpoints a folder has."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError, DamagedFileError
from distrib.run_folder.files import parse, read_bytes
from distrib.run_folder.formats import MANIFEST as FORM

MANIFEST = "manifest.json"
_SEAL = re.compile(rb'^(.*),"sha256":"([0-9a-f]{64})"}\n$', re.DOTALL)


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, whose last key is the SHA-256 of the text without it."""
    text = json.dumps(manifest, separators=(",", ":"))
    return f'{text[:-1]},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in this folder. Raises CheckpointError if it is not as it was written."""
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


def step_of(path: Path) -> int:
    """The steps done when it was saved, by its name."""
    return int(path.name.removeprefix("step-"))


def steps_of(folder: Path) -> Iterator[Path]:
    """All checkpoints in `folder`, the newest first, whole or not. Raises CheckpointError if it cannot be read."""
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
    """The newest checkpoint that holds files of its run, by name; None if there is none.

    A checkpoint's own tensors are not looked at: the manifest alone says what is in the files.
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
