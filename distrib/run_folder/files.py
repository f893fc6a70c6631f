"""The small files of a run folder: read and written with care, in one place.

Reading returns what has the right form, or raises DamagedFileError, whatever lies in the file's place: other JSON,
nesting without end, a folder, a FIFO. Writing raises WriteError, which names the file and the reason.
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
    """Open a file to read it. Raises FileNotFoundError, and DamagedFileError for all that is no readable file.

    To open a FIFO would wait for a writer, to open a device may have effects.
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
    """The content of a file. Raises DamagedFileError, also if there is none."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None


def parse(text: str | bytes, form: TypeAdapter[T], where: object) -> T:
    """The JSON in `text`, which must have this form. Raises DamagedFileError that begins with `where`."""
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
    """The JSON file's value, of this form. Raises DamagedFileError, also if there is no file."""
    return parse(read_bytes(path), form, path)


def lines_of(path: Path) -> Iterator[bytes]:
    """A file's lines with their line ends; none if there is no file. Raises DamagedFileError."""
    try:
        with open_regular(path) as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None


def read_lines(path: Path, form: TypeAdapter[T], trouble: list[str]) -> Iterator[T]:
    """The entries of a JSON-lines file, none if there is no file; what cannot be read is left out, and one line in
    `trouble` says so. A last line that was not written to its end is left out without a word."""
    found = Unreadable(path)
    try:
        for number, line in enumerate(lines_of(path), start=1):
            try:
                yield parse(line, form, path)
            except DamagedFileError:
                if line.endswith(b"\n"):
                    found.add(number)
    except DamagedFileError as error:
        trouble.append(str(error))
    trouble.extend(found.said())


class Unreadable:
    """Counts the lines of a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count, self._first = 0, 0

    def add(self, number: int) -> None:
        self._count += 1
        self._first = min(self._first or number, number)

    def said(self) -> list[str]:
        """One line, if there are any."""
        what = "line" if self._count == 1 else f"{self._count} lines, the first is line"
        return [f"{self.path}: damaged: cannot read {what} {self._first}"] if self._count else []


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names this file."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}; what was saved before is untouched: start the run "
            "again to go on"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: other processes read it. Raises WriteError."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)  # whatever it is: to open a FIFO would wait
            with partial.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


class Appended:
    """A file to which whole lines are appended, each handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        """Raises WriteError."""
        self.path = path
        with writing(path):
            # Without waiting for a FIFO's reader; there is no file of another kind once a run has started.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666)

    def append(self, line: str) -> None:
        """Raises WriteError, and then takes back what was written of the line."""
        rest = f"{line}\n".encode()
        with writing(self.path):
            size = os.fstat(self._file).st_size
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with suppress(OSError):
                    os.truncate(self._file, size)
                raise

    def close(self) -> None:
        os.close(self._file)


def append_line(path: Path, line: str) -> None:
    """Append one line to a file. Raises WriteError."""
    file = Appended(path)
    try:
        file.append(line)
    finally:
        file.close()


def set_aside(path: Path) -> Path:
    """Give what lies there a name that is free, `NAME.damaged-1` or the next; returns it. Raises WriteError."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    with writing(path):
        path.rename(aside)
    return aside


def to_text(value: Any) -> str:
    """JSON over several lines, for people."""
    return json.dumps(value, indent=2) + "\n"
