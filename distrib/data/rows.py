"""Finds local files, and reads their rows with Hugging Face's `datasets`, or whole as bytes."""

import glob
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from distrib.errors import ConfigError, and_more
from distrib.extras import require

if TYPE_CHECKING:
    from rich.console import Console

_KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson"), "json"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # datasets decompresses these as it reads
_ROWS = 1000  # at a time

Encoded = TypeVar("Encoded")
Row = dict[str, Any]
Columns = dict[str, tuple[type, ...]]  # column name -> allowed types


class Files(NamedTuple):
    """Files of one kind, or those of a folder that `Dataset.save_to_disk` wrote."""

    kind: str  # json | csv | tsv | parquet | arrow | text | saved | bytes: each file is a row with one column of bytes
    paths: list[Path]
    key: str  # the config key that named it

    def __str__(self) -> str:
        return str(self.paths[0].parent) if self.kind == "saved" else and_more(list(map(str, self.paths)), 1)


class RowError(Exception):
    """A row of a batch that is refused. `index`: its place in the batch. The message goes on after 'row 7 of FILE'."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def expand_globs(globs: str | Sequence[str], key: str) -> list[Path]:
    """Return the files that the globs (`**` is allowed) match, sorted by path. `stdlib` means Python's library.

    Raises ConfigError, which names the config's `key`, if a glob matches no file.
    """
    files: set[str] = set()
    for pattern in [globs] if isinstance(globs, str) else globs:
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


def find_files(files: Any, key: str) -> list[Files]:
    """Return the files that the globs match, in the order of the globs; files of one glob are sorted by path.

    A folder must be one that `Dataset.save_to_disk` wrote. A file's suffix, in any case, decides its kind. A file with
    an unknown suffix is text, and is one row. Raises ConfigError, also if the extra `huggingface` is not installed.
    """
    require("huggingface", f"{key}: reading rows", "datasets")
    patterns = [files] if isinstance(files, str) else files
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{key}: {files!r}; give local files: a glob, or a list of them")
    found: list[Files] = []
    for pattern in patterns:
        folder = Path(pattern).expanduser()
        if folder.is_dir():
            found.append(Files("saved", _saved(folder, key), key))
        else:
            files_of_a_kind = itertools.groupby(expand_globs(pattern, key), _kind)
            found.extend(Files(kind, list(paths), key) for kind, paths in files_of_a_kind)
    return found


def _kind(path: Path) -> str:
    named = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _KINDS.get(named.suffix.lower(), "text")


def report_text(found: list[Files], console: "Console") -> None:
    """Print which files without the suffix .txt are read as text, because one may be a data file with a misspelt
    suffix."""
    text = [path for files in found if files.kind == "text" for path in files.paths if path.suffix != ".txt"]
    if text:
        console.print(f"{found[0].key}: read as text, a row each: {and_more(list(map(str, text)), 1)}", markup=False)


def _saved(folder: Path, key: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ConfigError(f"{key}: {folder} holds several splits; name one of them: {', '.join(splits)}")
    if not (folder / "state.json").exists():
        raise ConfigError(f"{key}: {folder} is a folder, not one of Dataset.save_to_disk; give a glob: {folder}/*")
    return sorted(folder.glob("*.*"))


def read_rows(files: Files, columns: Columns) -> Iterator[list[Row]]:
    """Yield some rows at a time, with only these `columns`. Raises ConfigError, which names file and row."""
    refused: tuple[type[Exception], ...] = (OSError, ValueError, TypeError)
    if files.kind != "bytes":
        from datasets.exceptions import DatasetsError

        refused = (*refused, DatasetsError)
    before = 0
    batches = _batches(files, columns)
    while True:
        try:
            batch = next(batches, None)
        except refused as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{files.key}: {files} cannot be read as {files.kind}: {reason}") from None
        if batch is None:
            return
        if missing := [column for column in columns if column not in batch]:
            raise ConfigError(
                f"{files.key}: {files} has no column {missing[0]!r}; it has: {', '.join(map(str, batch))}; "
                "set the column names with the keys that end in _column"
            )
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*map(batch.get, columns), strict=True)]
        for number, row in enumerate(rows, before + 1):
            for column, value in row.items():
                if not isinstance(value, columns[column]):
                    kinds = " or ".join(kind.__name__ for kind in columns[column])
                    raise ConfigError(
                        f"{files.key}: row {number} of {files} has {value!r} in column {column!r}, which is not a "
                        f"{kinds}; leave such rows out, or name another column"
                    )
        before += len(rows)
        yield rows


def encoded_rows(
    files: Sequence[Files], columns: Columns, encode: Callable[[list[Row]], Encoded]
) -> Iterator[tuple[list[Row], Encoded]]:
    """Yield some rows at a time, and what `encode` makes of them. If it raises RowError, raises ConfigError, which
    names file and row."""
    for some in files:
        before = 0
        for rows in read_rows(some, columns):
            try:
                yield rows, encode(rows)
            except RowError as error:
                raise ConfigError(f"{some.key}: row {before + error.index + 1} of {some} {error}") from None
            before += len(rows)


def _batches(files: Files, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield some rows at a time, as `{column: values}`. Nothing is copied to the cache of `datasets`."""
    if files.kind == "bytes":
        (column,) = columns
        yield from ({column: [path.read_bytes()]} for path in files.paths)
        return
    import datasets

    if files.kind == "saved":
        yield from datasets.load_from_disk(str(files.paths[0].parent)).iter(_ROWS)
        return
    options: dict[str, Any] = {}
    if files.kind == "text":
        options = {"sample_by": "document"}
    elif files.kind in ("csv", "tsv"):  # otherwise digits would become numbers, and "NA" a missing value
        options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
        options["sep"] = "\t" if files.kind == "tsv" else ","
    with TemporaryDirectory() as cache:  # `datasets` creates a lock file there
        paths = [glob.escape(os.path.abspath(path)) for path in files.paths]
        read = datasets.load_dataset(
            "csv" if files.kind == "tsv" else files.kind,
            data_files=paths,
            split="train",
            streaming=True,
            cache_dir=cache,
            **options,
        )
    yield from read.iter(_ROWS)
