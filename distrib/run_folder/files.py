"""Reads and writes the small files of a run folder.

Reading returns validated values or raises DamagedFileError, whatever is found instead: JSON of another form or endless
nesting, a folder, a FIFO. Writing raises WriteError, which names the file and the reason.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from distrib.errors import DamagedFileError, WriteError

T = TypeVar("T")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises FileNotFoundError, and DamagedFileError if it is not a readable regular file.

    The type is checked first, because opening a FIFO waits for a writer, and opening a device may have side effects.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DamagedFileError(f"{path}: damaged: not a regular file")
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises DamagedFileError, also if the file does not exist."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None


def parse(text: str | bytes, form: TypeAdapter[T], where: object) -> T:
    """Parse JSON and validate its form. Raises DamagedFileError, whose message begins with `where`."""
    try:
        return form.validate_python(json.loads(text.decode() if isinstance(text, bytes) else text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DamagedFileError(f"{where}: damaged: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise DamagedFileError(f"{where}: damaged: not valid JSON: {reason}") from None


def read_json(path: Path, form: TypeAdapter[T]) -> T:
    """Read a JSON file and validate its form. Raises DamagedFileError, also if the file does not exist."""
    return parse(read_bytes(path), form, path)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield a file's lines with their line ends; none if the file does not exist. Raises DamagedFileError."""
    try:
        with open_regular(path) as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None


def read_lines(path: Path, form: TypeAdapter[T], trouble: list[str]) -> Iterator[T]:
    """Yield the valid entries of a JSON-lines file; none if the file does not exist.

    If lines are damaged, one message is appended to `trouble`. An incomplete last line is skipped without a message.
    """
    unreadable = Unreadable(path)
    try:
        for number, line in enumerate(lines_of(path), start=1):
            try:
                yield parse(line, form, path)
            except DamagedFileError:
                if line.endswith(b"\n"):
                    unreadable.add(number)
    except DamagedFileError as error:
        trouble.append(str(error))
    trouble.extend(unreadable.said())


class Unreadable:
    """Counts the damaged lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count, self._first = 0, 0

    def add(self, number: int) -> None:
        self._count += 1
        self._first = min(self._first or number, number)

    def said(self) -> list[str]:
        """Return one message if there are damaged lines, else none."""
        what = "line" if self._count == 1 else f"{self._count} lines, the first is line"
        return [f"{self.path}: damaged: cannot read {what} {self._first}"] if self._count else []


def not_written(path: Path, error: OSError) -> WriteError:
    """Return the error that names the file and the reason."""
    return WriteError(
        f"{path}: cannot be written: {error.strerror or error}; what was saved before is untouched: start the run "
        "again to resume"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError into a WriteError that names this file."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from None


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically, so that other processes never read half of it. Raises WriteError."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)  # it may be a FIFO, and opening one would block
            with partial.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


def set_aside(path: Path) -> Path:
    """Rename a file to the first free name of `NAME.damaged-1`, `NAME.damaged-2`, …, and return it. Raises
    WriteError."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    with writing(path):
        path.rename(aside)
    return aside


def to_text(value: Any) -> str:
    """Return indented JSON."""
    return json.dumps(value, indent=2) + "\n"
