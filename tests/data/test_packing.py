"""Documents are packed once, completely, by concurrent processes too, and each byte of a text is a target once."""

import hashlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrib.data.documents import Documents, PaddedWindows
from distrib.data.packing import pack
from distrib.data.rows import Files, expand_globs
from distrib.errors import ConfigError
from distrib.tasks.language_model import SEPARATOR, encode

FORK = multiprocessing.get_context("fork")  # real processes, which need not import torch again


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distrib" / "tokens"


def write(folder: Path, documents: Sequence[bytes]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number:04}.txt").write_bytes(document)
    return expand_globs(str(folder / "*.txt"), "task.text")


def pack_bytes(files: list[Path]) -> Path:
    return pack([Files("bytes", files, "task.text")], None, {"content": (bytes,)}, encode, "<u2", {})


def unpacked(folder: Path, split: str) -> list[bytes]:
    """Return the documents of a split."""
    found = Documents(folder, split)
    (separators,) = np.nonzero(found.tokens == SEPARATOR)
    np.testing.assert_array_equal(found.starts, [*separators, len(found.tokens)])
    return [bytes(found.tokens[start + 1 : end].tolist()) for start, end in pairwise(found.starts)]


def held_out(document: bytes) -> bool:
    return int(hashlib.sha256(document).hexdigest()[:16], 16) % 20 == 0


@settings(max_examples=50)
@given(documents=st.lists(st.binary(max_size=40), min_size=1, max_size=30), length=st.integers(1, 50))
def test_documents_are_split_by_content_and_windows_cover_them(documents: list[bytes], length: int) -> None:
    with TemporaryDirectory() as folder:
        packed = pack_bytes(write(Path(folder), documents))
        assert unpacked(packed, "train") == [document for document in documents if not held_out(document)]
        assert unpacked(packed, "eval") == [document for document in documents if held_out(document)]
        windows = PaddedWindows(packed, "train", length, SEPARATOR)
        tokens = np.append(windows.tokens, SEPARATOR).astype(np.int64)
        rows = windows.__getitems__(list(range(len(windows)))).numpy()
        targets = rows[:, 1:].flatten()
        filled = len(targets) - (len(tokens) - 1)
        assert 0 <= filled < length
        np.testing.assert_array_equal(targets, np.append(tokens[1:], [SEPARATOR] * filled))
        np.testing.assert_array_equal(
            rows[1:, 0], rows[:-1, -1]
        )  # each window starts with the last token of the one before
        for window, row in zip(windows, rows, strict=True):  # one after the other
            np.testing.assert_array_equal(window, row)


def test_packed_text_is_cached_by_content(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [b"one", b"two", b"three"]
    files = write(tmp_path / "text", documents)
    first = pack_bytes(files)
    inode = (first / "train.tokens.npy").stat().st_ino
    assert "3 documents" in capsys.readouterr().err
    os.utime(files[0])
    assert pack_bytes(files) == pack_bytes(write(tmp_path / "copied", documents)) == first
    assert (first / "train.tokens.npy").stat().st_ino == inode
    assert capsys.readouterr().err == ""
    files[1].write_bytes(b"2wo")  # of the same length
    second = pack_bytes(files)
    assert second != first
    assert b"2wo" in unpacked(second, "train") + unpacked(second, "eval")
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {first.name, second.name}


def side_by_side(count: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start `count` processes at the same time, wait for them, and return what they put into the queue."""
    queue, gate = FORK.SimpleQueue(), FORK.Barrier(count)
    processes = [FORK.Process(target=work, args=(queue, gate, *arguments)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


def packs(queue: Any, gate: Any, files: list[Path]) -> None:
    gate.wait()
    folder = pack_bytes(files)
    queue.put((folder, hashlib.sha256((folder / "train.tokens.npy").read_bytes()).hexdigest()))


def test_concurrent_processes_pack_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "text", [os.urandom(1_000_000) for _ in range(10)])
    found = side_by_side(4, packs, files)
    assert len(set(found)) == 1  # every process found a complete folder
    assert capfd.readouterr().err.count("packing") == 1


def packs_as_far_as(size: int, killed: bool, files: list[Path]) -> None:
    """Pack with a limit on file sizes: beyond it, writing fails as on a full disk, or kills the process."""
    if killed:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(ConfigError, match=r"cannot pack into .* File too large"):
        pack_bytes(files)


@pytest.mark.parametrize("killed", [True, False])
def test_unfinished_packing_is_repeated(tmp_path: Path, cache: Path, killed: bool) -> None:
    documents = [os.urandom(50_000) for _ in range(20)]
    files = write(tmp_path / "text", documents)
    process = FORK.Process(target=packs_as_far_as, args=(500_000, killed, files))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGXFSZ if killed else 0)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    packed = pack_bytes(files)
    assert unpacked(packed, "train") == [document for document in documents if not held_out(document)]
    assert [path for path in cache.iterdir() if path.is_dir()] == [packed]


def test_stdlib_finds_pythons_library() -> None:
    files = expand_globs("stdlib", "task.text")
    assert Path(os.__file__) in files
    assert not [path for path in files if "site-packages" in path.parts]


def test_a_glob_without_files_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.text: 'no/such/\*' matches no file, looked for from /"):
        expand_globs(["stdlib", "no/such/*"], "task.text")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot pack into .*file.*; XDG_CACHE_HOME sets where"):
        pack_bytes(write(tmp_path / "text", [b"text"]))
