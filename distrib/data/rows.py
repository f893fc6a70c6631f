"""Reads rows of local files with Hugging Face's `datasets`, and packs them as tokenised documents on first use."""

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from distrib.data.documents import DocumentWriter
from distrib.data.token_cache import fingerprint, get_or_build, held_out
from distrib.data.tokens import find_text
from distrib.errors import ConfigError, and_more
from distrib.extras import require

if TYPE_CHECKING:
    from rich.progress import Progress

_FORMAT = 1  # increase it with any change that packs the same files and settings differently
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

Row = dict[str, Any]
Columns = dict[str, tuple[type, ...]]  # column name -> allowed types
Encode = Callable[[list[Row]], list[tuple[Sequence[int], int]]]  # returns tokens and document number of each row


class Source(NamedTuple):
    """Files of one kind, or a folder that `Dataset.save_to_disk` wrote."""

    kind: str  # json | csv | tsv | parquet | arrow | text | saved
    paths: list[Path]
    key: str  # the config key that named it

    def __str__(self) -> str:
        return and_more(list(map(str, self.paths)), 1)


def find_sources(files: Any, key: str) -> list[Source]:
    """Return the files that the globs match, in the order of the globs; files of one glob are sorted by path.

    A folder must be one that `Dataset.save_to_disk` wrote. A file's suffix, in any case, decides its kind. A file with
    an unknown suffix is text, and is one row. Raises ConfigError.
    """
    patterns = [files] if isinstance(files, str) else files
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{key}: {files!r}; give local files: a glob, or a list of them")
    found: list[Source] = []
    for pattern in patterns:
        folder = Path(pattern).expanduser()
        if folder.is_dir():
            found.append(Source("saved", [_saved(folder, key)], key))
        else:
            files_of_a_kind = itertools.groupby(find_text(pattern, key), _kind)
            found.extend(Source(kind, list(paths), key) for kind, paths in files_of_a_kind)
    return found


def _kind(path: Path) -> str:
    named = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _KINDS.get(named.suffix.lower(), "text")


def _report_text(sources: list[Source], progress: "Progress") -> None:
    """Print which files without the suffix .txt are read as text, because one may be a data file with a misspelt
    suffix."""
    found = [path for source in sources if source.kind == "text" for path in source.paths if path.suffix != ".txt"]
    if found:
        shown = and_more(list(map(str, found)), 1)
        progress.console.print(f"{sources[0].key}: read as text, a row each: {shown}", markup=False)


def pack_rows(
    train: list[Source],
    evaluation: list[Source] | None,
    columns: Columns,
    encode: Encode,
    dtype: str,
    settings: dict[str, Any],
) -> Path:
    """Return the folder that holds the tokens of these rows in the splits `train` and `eval`. Packs them if needed.

    If `evaluation` is None, one row in 20 is held out, chosen by the content of its `columns`. The cache key is made of
    the content of the files, `dtype` and `settings`; `settings` must name all that `encode` depends on. Raises
    ConfigError.
    """
    require("huggingface", f"{train[0].key}: reading rows")
    contents = _contents(train, evaluation)
    name = json.dumps([_FORMAT, contents, evaluation is None, list(columns), dtype, settings], sort_keys=True)

    def pack(folder: Path, progress: "Progress") -> None:
        task = progress.add_task("packing rows", total=None)
        with DocumentWriter(folder, "train", dtype) as trained, DocumentWriter(folder, "eval", dtype) as evaluated:
            for sources, default in ((train, trained), (evaluation or [], evaluated)):
                _report_text(sources, progress)
                for rows in itertools.chain.from_iterable(_read(source, columns) for source in sources):
                    for row, (tokens, number) in zip(rows, encode(rows), strict=True):
                        aside = evaluation is None and held_out(hashlib.sha256(_content(row)).digest())
                        (evaluated if aside else default).add(tokens, number)
                    progress.advance(task, len(rows))
                    done = progress.tasks[0].completed
                    progress.update(task, description=f"packing: {done:,.0f} rows")
        if _contents(train, evaluation) != contents:
            raise ConfigError(f"{train[0].key}: {train[0]} or another file changed while it was packed; start again")

    return get_or_build(hashlib.sha256(name.encode()).hexdigest(), pack, train[0].key)


def _contents(train: list[Source], evaluation: list[Source] | None) -> list[Any]:
    """Return kind and SHA-256 of all files."""
    return [
        [[source.kind, [fingerprint(path, source.key)[1].hex() for path in _files(source)]] for source in sources]
        for sources in (train, evaluation or [])
    ]


def _content(row: Row) -> bytes:
    return json.dumps(list(row.values())).encode()


def _saved(folder: Path, key: str) -> Path:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ConfigError(f"{key}: {folder} holds several splits; name one of them: {', '.join(splits)}")
    if not (folder / "state.json").exists():
        raise ConfigError(f"{key}: {folder} is a folder, not one of Dataset.save_to_disk; give a glob: {folder}/*")
    return folder


def _files(source: Source) -> list[Path]:
    return sorted(source.paths[0].glob("*.*")) if source.kind == "saved" else source.paths


def _read(source: Source, columns: Columns) -> Iterator[list[Row]]:
    """Yield some rows at a time, with only these `columns`. Raises ConfigError, which names file and row."""
    from datasets.exceptions import DatasetsError

    before = 0
    batches = _batches(source, columns)
    while True:
        try:
            batch = next(batches, None)
        except (DatasetsError, OSError, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{source.key}: {source} cannot be read as {source.kind}: {reason}") from None
        if batch is None:
            return
        if missing := [column for column in columns if column not in batch]:
            raise ConfigError(
                f"{source.key}: {source} has no column {missing[0]!r}; it has: {', '.join(map(str, batch))}; "
                "set the column names with the keys that end in _column"
            )
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*map(batch.get, columns), strict=True)]
        for number, row in enumerate(rows, before + 1):
            for column, value in row.items():
                if not isinstance(value, columns[column]):
                    kinds = " or ".join(kind.__name__ for kind in columns[column])
                    raise ConfigError(
                        f"{source.key}: row {number} of {source} has {value!r} in column {column!r}, which is not a "
                        f"{kinds}; leave such rows out, or name another column"
                    )
        before += len(rows)
        yield rows


def _batches(source: Source, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield some rows at a time, as `{column: values}`. Nothing is copied to the cache of `datasets`."""
    import datasets

    if source.kind == "saved":
        yield from datasets.load_from_disk(str(source.paths[0])).iter(_ROWS)
        return
    options: dict[str, Any] = {}
    if source.kind == "text":
        options = {"sample_by": "document"}
    elif source.kind in ("csv", "tsv"):  # otherwise digits would become numbers, and "NA" a missing value
        options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
        options["sep"] = "\t" if source.kind == "tsv" else ","
    with TemporaryDirectory() as cache:  # `datasets` creates a lock file there
        paths = [glob.escape(os.path.abspath(path)) for path in source.paths]
        read = datasets.load_dataset(
            "csv" if source.kind == "tsv" else source.kind,
            data_files=paths,
            split="train",
            streaming=True,
            cache_dir=cache,
            **options,
        )
    yield from read.iter(_ROWS)
