"""Text files as one memory-mapped row of tokens: packed on first use, kept by content.

A token is a byte, or the separator that stands before each document (a file is one) and once at the end. What is kept
lies in `$XDG_CACHE_HOME/distrib/tokens`, in a folder named by the SHA-256 of all that was packed, so that other text
is another folder. To know it every start reads the files, about a second a gigabyte.
"""

import glob
import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import write_array_header_1_0
from torch import Tensor
from torch.utils.data import Dataset

from distrib.errors import ConfigError

SEPARATOR = 256
VOCABULARY = 257
_DTYPE = "<u2"
_FORMAT = b"1: uint16, one document in 20 held out"  # whatever changes the files for the same text belongs in here
_ONE_HELD_OUT_IN = 20


class Document(NamedTuple):
    path: Path
    size: int  # bytes
    digest: bytes  # SHA-256

    @property
    def held_out(self) -> bool:
        """By content alone: whatever else is packed, a document and its copies stay on one side."""
        return int.from_bytes(self.digest[:8], "big") % _ONE_HELD_OUT_IN == 0


def find_text(text: str | Sequence[str]) -> list[Path]:
    """The files that globs (`**` included) match, in the order of their paths; `stdlib` is Python's own library.

    Raises ConfigError where a glob matches no file.
    """
    files: set[str] = set()
    for pattern in [text] if isinstance(text, str) else text:
        matched = _stdlib() if pattern == "stdlib" else glob.glob(os.path.expanduser(pattern), recursive=True)
        found = {path for path in matched if os.path.isfile(path)}
        if not found:
            raise ConfigError(f"task.text: {pattern!r} matches no file, looked for from {os.getcwd()}")
        files |= found
    return [Path(path) for path in sorted(files)]


def _stdlib() -> list[str]:
    """Python's own source, without its tests, which some distributions leave out."""
    root = sysconfig.get_path("stdlib")
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    found = glob.glob(os.path.join(root, "**", "*.py"), recursive=True)
    return [path for path in found if not left_out & set(Path(path).relative_to(root).parts)]


def pack(files: Sequence[Path]) -> Path:
    """The folder with `train.npy` and `eval.npy`, in which the tokens of these files lie; packs them where needed.

    Any number of processes may ask at once: one packs, under a lock that dies with it. Raises ConfigError where a file
    cannot be read, or the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distrib" / "tokens"
    try:
        documents = [Document(path, len(data := path.read_bytes()), hashlib.sha256(data).digest()) for path in files]
        key = hashlib.sha256(b"".join([_FORMAT, *(document.digest for document in documents)])).hexdigest()
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not (cache / key).exists():
                _pack(documents, cache / key)
    except OSError as error:
        raise ConfigError(
            f"task.text: cannot pack into {cache}: {error}; XDG_CACHE_HOME says where the cache is"
        ) from None
    return cache / key


def _pack(documents: list[Document], folder: Path) -> None:
    """Whole or not at all: what a process left that was killed is written anew."""
    from rich.console import Console
    from rich.progress import Progress

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(f"packing {len(documents):,} files", total=sum(d.size for d in documents))
        for split, held_out in (("train", False), ("eval", True)):
            chosen = [document for document in documents if document.held_out == held_out]
            length = sum(1 + document.size for document in chosen) + 1
            # Written through a file: on a full disk a memory map would end us with SIGBUS, and not a word.
            with open(partial / f"{split}.npy", "wb") as file:
                write_array_header_1_0(file, {"descr": _DTYPE, "fortran_order": False, "shape": (length,)})
                separator = np.array([SEPARATOR], _DTYPE).tobytes()
                for path, size, digest in chosen:
                    data = path.read_bytes()
                    if hashlib.sha256(data).digest() != digest:
                        raise ConfigError(f"task.text: {path} changed while it was packed; start again")
                    file.write(separator)
                    file.write(np.frombuffer(data, np.uint8).astype(_DTYPE).tobytes())
                    progress.advance(task, size)
                file.write(separator)
                file.flush()
                os.fsync(file.fileno())
    partial.rename(folder)


class Windows(Dataset[Tensor]):
    """`length + 1` tokens each, int64. Neighbours share one, so that each token but the first is a target once.

    The last window is filled up with separators, which nothing is counted for.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([range(len(self))[index]])[0]  # an IndexError ends who iterates

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A whole micro-batch, shape (len(indices), length + 1)."""
        places = np.array(indices, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        return torch.from_numpy(self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        return Windows, (self.path, self.length)  # to a worker goes the path, not what is mapped
