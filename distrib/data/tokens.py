"""Text files as one memory-mapped row of tokens: packed on first use, kept by content.

A token is a byte, or the separator that stands before each document (a file is one) and once at the end. To know the
content every start reads the files, about a second a gigabyte.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distrib.data.token_cache import TokenWriter, fingerprint, get_or_build, held_out
from distrib.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

SEPARATOR = 256
VOCABULARY = 257
_DTYPE = "<u2"
_FORMAT = b"1: uint16, one document in 20 held out"  # whatever changes the files for the same text belongs in here


class Document(NamedTuple):
    path: Path
    size: int  # bytes
    digest: bytes  # SHA-256


def find_text(text: str | Sequence[str], key: str = "task.text") -> list[Path]:
    """The files that globs (`**` included) match, in the order of their paths; `stdlib` is Python's own library.

    Raises ConfigError, which names the config's `key`, where a glob matches no file.
    """
    files: set[str] = set()
    for pattern in [text] if isinstance(text, str) else text:
        matched = _stdlib() if pattern == "stdlib" else glob.glob(os.path.expanduser(pattern), recursive=True)
        found = {path for path in matched if os.path.isfile(path)}
        if not found:
            raise ConfigError(f"{key}: {pattern!r} matches no file, looked for from {os.getcwd()}")
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

    Raises ConfigError where a file cannot be read, or the cache cannot be written.
    """
    documents = [Document(path, *fingerprint(path, "task.text")) for path in files]
    key = hashlib.sha256(b"".join([_FORMAT, *(document.digest for document in documents)])).hexdigest()
    return get_or_build(key, lambda folder, progress: _pack(documents, folder, progress), "task.text")


def _pack(documents: list[Document], folder: Path, progress: "Progress") -> None:
    task = progress.add_task(f"packing {len(documents):,} files", total=sum(d.size for d in documents))
    for split, is_held_out in (("train", False), ("eval", True)):
        with TokenWriter(folder / f"{split}.npy", _DTYPE) as writer:
            for path, size, digest in documents:
                if held_out(digest) == is_held_out:
                    data = path.read_bytes()
                    if hashlib.sha256(data).digest() != digest:
                        raise ConfigError(f"task.text: {path} changed while it was packed; start again")
                    writer.write([SEPARATOR])
                    writer.write(np.frombuffer(data, np.uint8))
                    progress.advance(task, size)
            writer.write([SEPARATOR])


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
