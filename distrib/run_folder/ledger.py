"""The ledger steps.jsonl: one line per step, append-only and hash-chained.

A line's `chain` is the SHA-256 of the previous line's chain and this line's text without its chain. So changing,
removing or repeating a line breaks the chain of every later line.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter

from distrib.errors import DamagedFileError, WriteError
from distrib.run_folder.files import lines_of, not_written, open_regular, parse, writing
from distrib.run_folder.formats import STEP

GENESIS = ""  # the chain before the first line
_ONE_LINE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


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
        try:
            size = os.fstat(self._file).st_size
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with suppress(OSError):
                    os.truncate(self._file, size)
                raise
        except OSError as error:
            raise not_written(self.path, error) from None

    def close(self) -> None:
        os.close(self._file)


def append_line(path: Path, line: str) -> None:
    """Append one line to a file. Raises WriteError."""
    file = Appended(path)
    try:
        file.append(line)
    finally:
        file.close()


class Ledger:
    """Appends chained lines to a JSON-lines file. Each line is passed to the operating system at once."""

    def __init__(self, path: Path, chain: str = GENESIS) -> None:
        """Continue after the line with this chain. Raises WriteError."""
        self.chain = chain
        self._file = Appended(path)
        self._failed: WriteError | None = None

    def append(self, entry: dict[str, Any]) -> None:
        """Append an entry with its chain. Raises WriteError; then every later call does too, or a step would be
        missing."""
        if self._failed is not None:
            raise self._failed
        text = to_json(entry)
        chain = link(self.chain, text)
        try:
            self._file.append(f'{text[:-1]},"chain":"{chain}"}}')
        except WriteError as error:
            self._failed = error
            raise
        self.chain = chain

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def chain_after(path: Path, steps: int, anchors: dict[int, str]) -> str | None:
    """Return the chain after the first `steps` steps; None if the last of their lines is missing or damaged.

    `anchors`: {step: chain before it} of the ledger's first step and of each step that follows lost lines.
    """
    return anchors[steps] if steps in anchors else _line_of(path, steps - 1)[1]


def cut(path: Path, steps: int, anchors: dict[int, str]) -> bool:
    """Remove the lines of step `steps` and later ones. Return whether there were any."""
    if not path.exists():
        return False
    if steps == min(anchors):
        end = 0
    elif steps in anchors:
        end = _line_from(path, steps)
    else:
        end = _line_of(path, steps - 1)[0]
    more = end < path.stat().st_size
    with writing(path):
        os.truncate(path, end)
    return more


def last_line(
    path: Path, form: TypeAdapter[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool] = lambda entry: True
) -> dict[str, Any] | None:
    """Return the last valid entry of a JSON-lines file that is wanted, or None."""
    with suppress(OSError, DamagedFileError):
        for line in _lines_from_the_end(path):
            with suppress(DamagedFileError):
                if wanted(entry := parse(line, form, path)):
                    return entry
    return None


@dataclass(frozen=True)
class Line:
    """A line of the ledger.

    `entry`: its content, None if it cannot be parsed. `whole`: whether it is unchanged, as far as the chain shows.
    `problem`: what is wrong with it or with the lines before it.
    """

    number: int  # from 1
    text: str
    entry: dict[str, Any] | None
    whole: bool
    problem: str | None = None


def walk(path: Path, anchors: dict[int, str]) -> Iterator[Line]:
    """Check the step number and the chain of each line of the ledger. Raises DamagedFileError.

    After a damaged line, later lines count as whole again if their chains match each other.
    """
    expected = min(anchors)
    before: set[str] = {anchors[expected]}  # possible chains of the previous line; empty: not known
    for number, raw in enumerate(lines_of(path), start=1):
        text = raw.decode(errors="replace")
        body, _, tail = text.partition(',"chain":"')
        try:
            entry = parse(raw, STEP, path)
        except DamagedFileError:
            expected, before = expected + 1, set()
            yield Line(number, text, None, False, "cannot be read as a step")
            continue
        step, problem = entry["step"], None
        if step < expected:
            what = f"is of step {step}, where step {expected} belongs; step {step} is there already"
            yield Line(number, text, entry, False, what)
            continue
        if step > expected:
            problem = f"is of step {step}, where step {expected} belongs; {steps(expected, step)} missing before it"
            before = set()
        if step in anchors:
            problem, before = None, {*before, anchors[step]}
        chains = {link(chain, body + "}") for chain in before}
        written = tail.removesuffix('"}\n')
        whole = tail.endswith('"}\n') and (not before or written in chains)
        if not whole:
            problem = f"the chain breaks: this line (step {step}), or one before it, was changed"
        expected, before = step + 1, {written, *chains} if not whole else {written}
        yield Line(number, text, entry, whole, problem)


def steps(first: int, end: int) -> str:
    """Return `step 3 is` or `steps 3 to 5 are`, for a message about the steps from `first` to `end - 1`."""
    return f"step {first} is" if end == first + 1 else f"steps {first} to {end - 1} are"


def _line_of(path: Path, step: int) -> tuple[int, str | None]:
    """Return the offset of the end of the line of `step`, and its chain; (0, None) if it is missing or damaged.

    The search starts at the end of the file, because a resumed step is near it.
    """
    with suppress(OSError, DamagedFileError):
        end = path.stat().st_size
        for line in _lines_from_the_end(path):
            with suppress(DamagedFileError):
                entry = parse(line, STEP, path)
                if entry["step"] == step and line.endswith(b"\n"):
                    return end, entry.get("chain")
            end -= len(line)
    return 0, None


def _line_from(path: Path, step: int) -> int:
    """Return the offset of the first line of `step` or of a later step."""
    place = 0
    for line in lines_of(path):
        with suppress(DamagedFileError):
            if parse(line, STEP, path)["step"] >= step:
                break
        place += len(line)
    return place


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield lines with their line ends, the last line first; it may have no line end. Raises OSError,
    DamagedFileError."""
    rest: list[bytes] = []  # parts of a line whose start is not read yet, in reverse order
    with open_regular(path) as file:
        place = file.seek(0, os.SEEK_END)
        while place:
            size = min(place, 1 << 16)
            place = file.seek(place - size)
            rest.append(file.read(size))
            if b"\n" in rest[-1]:
                lines = BytesIO(b"".join(reversed(rest))).readlines()
                rest = lines[:1]
                yield from reversed(lines[1:])
    yield b"".join(reversed(rest))


def link(chain: str, text: str) -> str:
    """Return the chain of a line. `chain`: of the previous line. `text`: the line's JSON text without its chain."""
    return hashlib.sha256(f"{chain}{text}".encode()).hexdigest()


def to_json(entry: dict[str, Any], indent: int | None = None) -> str:
    """Return JSON, on one line unless indented. Non-finite floats become null, because JSON cannot represent them."""
    if indent is None:
        return _ONE_LINE(finite(entry))
    return json.dumps(finite(entry), indent=indent, allow_nan=False)


def own_numbers(step: dict[str, Any]) -> dict[str, float | None]:
    """Return the task's own numbers (`Loss.sums`) in a step's line: those whose names begin with `train/`."""
    return {
        key: value
        for key, value in step.items()
        if key.startswith("train/") and (value is None or isinstance(value, int | float))
    }


def train_metrics(step: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and the task's own numbers of a step, under the names of metrics."""
    return {"train/loss": step["loss"], **own_numbers(step)}


def now() -> str:
    """Return the current time in UTC, in the format of the run folder's files."""
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")


def or_nan(value: float | None) -> float:
    """Return a number of a run folder, in which null stands for one that is not finite."""
    return math.nan if value is None else value


def finite(value: Any) -> Any:
    """Copy nested dictionaries and lists, and replace each non-finite float by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
