"""The cache of packed tokens: one folder for each content, either complete or absent, safe for concurrent processes.

A folder is in `$XDG_CACHE_HOME/distrib/tokens`. Its name is the SHA-256 of everything that determines its tokens.
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


def get_or_build(key: str, make: "Callable[[Path, Progress], None]", config_key: str) -> Path:
    """Return the cache's folder `key`. If it does not exist, `make(folder, progress)` fills it.

    Any number of processes may call this at once: one makes the folder, under a file lock, and the others wait. A
    folder that a killed process left unfinished is made again. Raises ConfigError, which names `config_key`, if the
    cache cannot be written.
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
            f"{config_key}: cannot pack into {cache}: {error}; XDG_CACHE_HOME sets where the cache is"
        ) from None
    return folder


class TokenWriter:
    """Writes an .npy file whose length is not known in advance.

    It does not use a memory map, because on a full disk that would kill the process with SIGBUS, without a message.
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
        """Write the header, which numpy pads so that a later, larger length still fits."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        write_array_header_1_0(self._file, header)


def fingerprint(path: Path, config_key: str) -> tuple[int, bytes]:
    """Return a file's size in bytes and SHA-256. Raises ConfigError, which names `config_key`, if it is unreadable."""
    size, digest = 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                size += len(part)
                digest.update(part)
    except OSError as error:
        raise ConfigError(f"{config_key}: cannot read {path}: {error.strerror}") from None
    return size, digest.digest()


def held_out(digest: bytes) -> bool:
    """Return whether a document is held out for evaluation: one in 20, chosen by its SHA-256.

    So the choice does not depend on other documents, and copies of a document are in the same split.
    """
    return int.from_bytes(digest[:8], "big") % 20 == 0
