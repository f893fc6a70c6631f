"""Packs documents into a cache of tokens on first use: one folder for each content, either complete or absent.

A folder is in `$XDG_CACHE_HOME/distrib/tokens`. Its name is the SHA-256 of everything that determines its tokens. Each
split has three .npy files. `tokens`: all documents, one after the other. `starts`: the index of each document's first
token, and at the end the number of tokens. `numbers`: one integer for each document, whose meaning the dataset defines.
If `encode` returns masks, there is a fourth. `learned`: for each token, whether the loss counts it.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.lib.format import write_array_header_1_0
from numpy.typing import ArrayLike

from distrib.data.rows import Columns, Files, Row, encoded_rows, report_text
from distrib.errors import ConfigError
from distrib.sha256 import sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

_FORMAT = 1  # increase it with any change that packs the same files and settings differently

# tokens and number of each document, and if `masked`, for each of its tokens whether the loss counts it
Encoded = Sequence[tuple[ArrayLike, int] | tuple[ArrayLike, int, ArrayLike]]
Encode = Callable[[list[Row]], Encoded]


def pack(
    train: list[Files],
    evaluation: list[Files] | None,
    columns: Columns,
    encode: Encode,
    dtype: str,
    settings: dict[str, Any],
    masked: bool = False,
) -> Path:
    """Return the folder that holds the tokens of these rows in the splits `train` and `eval`. Packs them if needed.

    A row is a document, and `encode` is the tokenizer. If `evaluation` is None, one row in 20 is held out, chosen by
    the content of its `columns`. The cache key is made of the content of the files, `dtype` and `settings`; `settings`
    must name all that `encode` depends on, and differ if it is `masked`. Each start reads the files to compute it,
    which takes about a second per gigabyte. Raises ConfigError if a file cannot be read, `encode` refuses a row, or
    the cache cannot be written.
    """
    splits = (train, evaluation or [])
    every = list(itertools.chain(*splits))
    digests = {path: _digest(path, files.key) for files in every for path in files.paths}
    contents = [[[files.kind, [digests[path] for path in files.paths]] for files in split] for split in splits]
    key = json.dumps([_FORMAT, contents, evaluation is None, list(columns), dtype, settings], sort_keys=True)

    def build(folder: Path, progress: "Progress") -> None:
        one_a_file = all(files.kind in ("bytes", "text") for files in every)
        task = progress.add_task("packing", total=sum(len(files.paths) for files in every) if one_a_file else None)
        train_writer, eval_writer = (DocumentWriter(folder, split, dtype, masked) for split in ("train", "eval"))
        with train_writer as trained, eval_writer as evaluated:
            for split, default in zip(splits, (trained, evaluated), strict=True):
                report_text(split, progress.console)
                for rows, documents in encoded_rows(split, columns, encode):
                    for row, document in zip(rows, documents, strict=True):
                        (evaluated if evaluation is None and _held_out(row) else default).add(*document)
                    progress.advance(task, len(rows))
                    done = progress.tasks[0].completed
                    progress.update(task, description=f"packing: {done:,.0f} documents")
        for path, digest in digests.items():
            if _digest(path, train[0].key) != digest:
                raise ConfigError(f"{train[0].key}: {path} changed while it was packed; start again")

    return _get_or_build(hashlib.sha256(key.encode()).hexdigest(), build, train[0].key)


def _digest(path: Path, config_key: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ConfigError(f"{config_key}: cannot read {path}: {error.strerror}") from None


def _held_out(row: Row) -> bool:
    """Return whether a row is held out for evaluation: one in 20, chosen by its SHA-256.

    So the choice does not depend on other rows, and copies of a row are in the same split.
    """
    values = list(row.values())
    content = values[0] if isinstance(values[0], bytes) else json.dumps(values).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % 20 == 0


def _get_or_build(name: str, build: "Callable[[Path, Progress], None]", config_key: str) -> Path:
    """Return the cache's folder `name`. If it does not exist, `build(folder, progress)` fills it.

    Any number of processes may call this at once: one makes the folder, under a file lock, and the others wait. A
    folder that a killed process left unfinished is made again.
    """
    from rich.console import Console
    from rich.progress import Progress

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distrib" / "tokens"
    folder, partial = cache / name, cache / f"{name}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with Progress(console=Console(file=sys.stderr)) as progress:
                    try:
                        build(partial, progress)
                    except ConfigError:  # its one line is enough
                        for task in progress.tasks:
                            progress.update(task.id, visible=False)
                        raise
                partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{config_key}: cannot pack into {cache}: {error}; XDG_CACHE_HOME sets where the cache is"
        ) from None
    return folder


class DocumentWriter:
    """Writes the files of a split into `folder`: three, or four if documents are `masked`. Use it as a context
    manager."""

    def __init__(self, folder: Path, split: str, dtype: str, masked: bool = False) -> None:
        self._tokens = _ArrayWriter(folder / f"{split}.tokens.npy", dtype)
        self._starts = _ArrayWriter(folder / f"{split}.starts.npy", "<i8")
        self._numbers = _ArrayWriter(folder / f"{split}.numbers.npy", "<i8")
        self._learned = _ArrayWriter(folder / f"{split}.learned.npy", "|b1") if masked else None

    def add(self, tokens: ArrayLike, number: int, learned: ArrayLike = ()) -> None:
        self._starts.write([self._tokens.length])
        self._numbers.write([number])
        self._tokens.write(tokens)
        if self._learned is not None:
            self._learned.write(learned)
            assert self._learned.length == self._tokens.length, "one for each token"

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._starts.write([self._tokens.length])
        for writer in (self._tokens, self._starts, self._numbers, self._learned):
            if writer is not None:
                writer.close(finish=error is None)


class _ArrayWriter:
    """Writes an .npy file whose length is not known in advance.

    It does not use a memory map, because on a full disk that would kill the process with SIGBUS, without a message.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115, see close
        self._write_header()

    def write(self, values: ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def close(self, finish: bool) -> None:
        with self._file:
            if finish:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        """Write the header, which numpy pads so that a later, larger length still fits."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        write_array_header_1_0(self._file, header)
