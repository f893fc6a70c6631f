"""Where packed tokens are kept: a folder for each content, whole or not there, whoever asks for it at once.

It lies in `$XDG_CACHE_HOME/distrib/tokens`, named by the SHA-256 of all that its tokens follow from.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.lib.format import write_array_header_1_0
from numpy.typing import ArrayLike

from distrib.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress


def get_or_build(key: str, make: "Callable[[Path, Progress], None]", asked_by: str) -> Path:
    """The cache's folder `key`; where it is not there, `make` fills it, and shows how far it has come.

    Any number of processes may ask at once: one makes it, under a lock that dies with it, and what a process left that
    was killed is made anew. Raises ConfigError, which names the config's key `asked_by`, where that cannot be written.
    """
    from rich.console import Console
    from rich.progress import Progress

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distrib" / "tokens"
    folder, partial = cache / key, cache / f"{key}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with Progress(console=Console(file=sys.stderr)) as progress:
                    make(partial, progress)
                partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{asked_by}: cannot pack into {cache}: {error}; XDG_CACHE_HOME says where the cache is"
        ) from None
    return folder


class TokenWriter:
    """An .npy file, of whose length nothing need be known before it is closed.

    Written through a file: on a full disk a memory map would end us with SIGBUS, and not a word.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115, closed on exit
        self._write_header()

    def write(self, tokens: ArrayLike) -> None:
        values = np.asarray(tokens, self.dtype)
        self._file.write(values.tobytes())
        self.length += len(values)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        """As long whatever the length: numpy leaves room for an axis to grow."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        write_array_header_1_0(self._file, header)


def fingerprint(path: Path, asked_by: str) -> tuple[int, bytes]:
    """Size in bytes and SHA-256. Raises ConfigError where the file cannot be read."""
    size, digest = 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                size += len(part)
                digest.update(part)
    except OSError as error:
        raise ConfigError(f"{asked_by}: cannot read {path}: {error.strerror}") from None
    return size, digest.digest()


def held_out(digest: bytes) -> bool:
    """One document in 20, by its SHA-256 alone: whatever else is packed, it and its copies stay on one side."""
    return int.from_bytes(digest[:8], "big") % 20 == 0
