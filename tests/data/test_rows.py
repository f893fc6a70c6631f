"""Every kind of file gives the same rows. They are cached by content. Unusable files are refused."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distrib.data.documents import Documents
from distrib.data.packing import pack
from distrib.data.rows import Columns, Row, find_files
from distrib.errors import ConfigError

datasets = pytest.importorskip("datasets")

# Values that csv readers convert to numbers or to missing values.
ROWS = [
    {"text": text, "label": number % 2} for number, text in enumerate(("one", "2023", "NA", "", 'a, "b"\nc', "7.0"))
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distrib" / "tokens"


def encode(rows: list[Row]) -> list[tuple[Sequence[int], int]]:
    return [([*row["text"].encode(), 256], int(row.get("label", 1))) for row in rows]


def packed(train: Any, evaluation: Any = None, settings: dict[str, Any] | None = None, text: str = "text") -> Path:
    columns: Columns = {text: (str,)}
    if evaluation != "text only":
        columns["label"] = (int, str)
    files = find_files(train, "task.files")
    held = None if evaluation in (None, "text only") else find_files(evaluation, "task.eval_files")
    return pack(files, held, columns, encode, "<u2", settings or {})


def unpacked(folder: Path, split: str) -> list[tuple[str, int]]:
    documents = Documents(folder, split)
    assert int(documents.starts[-1]) == len(documents.tokens)
    return [
        (bytes(documents.tokens[start : end - 1].tolist()).decode(), int(number))
        for start, end, number in zip(documents.starts, documents.starts[1:], documents.numbers, strict=False)
    ]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    path, data = str(folder / f"rows[1].{kind}"), datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "json":
        Path(path).write_text(json.dumps(rows))
    elif kind == "saved":
        data.save_to_disk(path)
        return path
    elif kind == "arrow":
        data.save_to_disk(folder / "arrow")
        os.rename(next((folder / "arrow").glob("*.arrow")), path)
    else:
        getattr(data, f"to_{kind}")(path)
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "saved"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    folder = packed(write(tmp_path / "train", kind, ROWS), write(tmp_path / "eval", kind, ROWS[1:]))
    expected = [(row["text"], row["label"]) for row in ROWS]
    assert unpacked(folder, "train") == expected
    assert unpacked(folder, "eval") == expected[1:]


def test_a_text_file_is_one_row_and_kinds_mix(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nlines")
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "c.jsonl").write_text('{"text": "row"}\n')
    patterns = [str(tmp_path / "*.txt"), str(tmp_path / "*[!t]")]
    found = unpacked(packed(patterns, "text only"), "train")
    assert found == [("two\n\nlines", 1), ("code", 1), ("row", 1)]
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "unpacked"}\n')
    assert unpacked(packed(str(tmp_path / "*.gz"), "text only"), "train") == [("unpacked", 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", '{"text": "a\\tb"}\n'),
        ("a.ndjson", '{"text": "a\\tb"}\n'),
        ("a.jsonlines", '{"text": "a\\tb"}\n'),
        ("A.CSV", "text\na\tb\n"),
        ("a.tsv", 'other\ttext\n1,2\t"a\tb"\n'),
    ],
)
def test_a_suffix_names_the_kind_in_either_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert unpacked(packed(str(tmp_path / "*"), "text only"), "train") == [("a\tb", 1)]
    with gzip.open(tmp_path / f"{name}.GZ", "wt") as file:
        file.write(content)
    assert unpacked(packed(str(tmp_path / "*.GZ"), "text only"), "train") == [("a\tb", 1)]
    assert "read as text" not in capsys.readouterr().err


def test_files_that_are_read_as_text_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsnl").write_text('{"text": "a"}')
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    packed(str(tmp_path / "*"), "text only")
    printed = " ".join(capsys.readouterr().err.split())
    assert f"task.files: read as text, a row each: {tmp_path}/a.jsnl and 1 more" in printed


def test_rows_are_held_out_by_their_content(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 3} for number in range(2000)]
    folder = packed(write(tmp_path / "all", "jsonl", rows))
    train, held = unpacked(folder, "train"), unpacked(folder, "eval")
    assert 60 < len(held) < 140  # one in 20
    assert sorted(train + held) == sorted((row["text"], row["label"]) for row in rows)
    again = packed(write(tmp_path / "some", "parquet", rows[::-2]))
    assert set(unpacked(again, "eval")) == {(row["text"], row["label"]) for row in rows[::-2]} & set(held)


def test_packed_rows_are_cached_by_content_and_settings(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path / "rows", "jsonl", ROWS)
    first = packed(files)
    assert "6 documents" in capsys.readouterr().err
    assert packed(files) == packed(write(tmp_path / "copied", "jsonl", ROWS)) == first
    assert capsys.readouterr().err == ""
    others = [
        packed(files, settings={"tokenizer": "other"}),
        packed(files, files),
        packed(write(tmp_path / "rows", "jsonl", ROWS[1:])),
    ]
    assert len({first, *others}) == 4
    assert {path for path in cache.iterdir() if path.is_dir()} == {first, *others}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": null, "label": 0}',
            "row 2 of .*a.jsonl has None in column 'text'",
        ),
        (
            "a.jsonl",
            '{"text": 5, "label": 0}',
            "row 1 of .* has 5 in column 'text', which is not a str; leave such rows out",
        ),
        ("a.jsonl", '{"body": "a", "label": 0}', "a.jsonl has no column 'text'; it has: body, label; set the column"),
        ("a.jsonl", '{"text": "a"', "a.jsonl cannot be read as json: JSON parse error"),
        ("a.parquet", "nothing of the kind", "a.parquet cannot be read as parquet: "),
        ("a.csv", "", "a.csv cannot be read as csv: "),
        ("a.txt", b"\xff\xfe", "a.txt cannot be read as text: 'utf-8' codec"),
    ],
)
def test_errors_in_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        packed(str(tmp_path / name))
    assert str(error.value).startswith("task.files: ")
    assert "\n" not in str(error.value)


def test_a_file_that_changes_while_packing_is_refused(tmp_path: Path, cache: Path) -> None:
    files = write(tmp_path / "rows", "jsonl", ROWS)

    def touching(rows: list[Row]) -> list[tuple[Sequence[int], int]]:
        write(tmp_path / "rows", "jsonl", ROWS[1:])
        return encode(rows)

    files = find_files(files, "task.files")
    with pytest.raises(ConfigError, match=r"task.files: .*rows\[1\].jsonl changed while it was packed"):
        pack(files, None, {"text": (str,)}, touching, "<u2", {})
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]


def test_paths_without_rows_are_refused(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(tmp_path / "both")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("no/such/*.jsonl", r"task.files: 'no/such/\*.jsonl' matches no file, looked for from /"),
        (str(tmp_path / "both"), "holds several splits; name one of them: test, train"),
        (str(tmp_path / "empty"), r"is a folder, not one of Dataset.save_to_disk; give a glob: .*/empty/\*"),
        ([], r"task.files: \[\]; give local files: a glob, or a list of them"),
        ({"train": "a"}, "give local files"),
        ([1], "give local files"),
    ):
        with pytest.raises(ConfigError, match=message):
            packed(given)
