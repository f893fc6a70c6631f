"""Text files as one memory-mapped array of tokens, packed on first use and cached by content.

A token is a byte or the separator, which precedes each document (a file) and ends the array. Every start reads the
files to compute their hashes, which takes about a second per gigabyte.
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
_FORMAT = b"1: uint16, one document in 20 held out"  # change it with any change that packs the same text differently


class Document(NamedTuple):
    path: Path
    size: int  # bytes
    digest: bytes  # SHA-256


def find_text(text: str | Sequence[str], key: str = "task.text") -> list[Path]:
    """Return the files that the globs (`**` is allowed) match, sorted by path. `stdlib` means Python's library.

    Raises ConfigError, which names the config's `key`, if a glob matches no file.
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
    """Return the source files of Python's library, without its tests, because some distributions leave them out."""
    root = sysconfig.get_path("stdlib")
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    found = glob.glob(os.path.join(root, "**", "*.py"), recursive=True)
    return [path for path in found if not left_out & set(Path(path).relative_to(root).parts)]


def pack(files: Sequence[Path]) -> Path:
    """Return the folder with `train.npy` and `eval.npy`, the tokens of these files. Packs them if needed.

    Raises ConfigError if a file cannot be read, or the cache cannot be written.
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
    """Samples of `length + 1` tokens, int64. Neighbours overlap by one, so each token but the first is a target once.

    The last window is padded with separators, which the loss does not count.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([range(len(self))[index]])[0]  # range raises the IndexError that ends an iteration

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a whole micro-batch, shape (len(indices), length + 1)."""
        places = np.array(indices, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        return torch.from_numpy(self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        return Windows, (self.path, self.length)  # pickle the path, so that a worker maps the file itself
