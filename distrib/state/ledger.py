"""steps.jsonl: one line a step, append-only, each line chained to all before it.

`chain` is the SHA-256 of the previous line's chain and this line's text without its chain, so that a line which is
changed, dropped or repeated afterwards breaks every later one.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from distrib.errors import RunDirError

GENESIS = ""  # the chain before the first line
_ONE_LINE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Ledger:
    """Appends to a JSON-lines file; each line is handed to the operating system at once."""

    def __init__(self, path: Path, chain: str = GENESIS) -> None:
        """Go on after the line with this chain."""
        self.chain = chain
        self._file = path.open("a", encoding="utf-8")

    def append(self, entry: dict[str, Any]) -> None:
        text = to_json(entry)
        self.chain = link(self.chain, text)
        self._file.write(f'{text[:-1]},"chain":"{self.chain}"}}\n')
        self._file.flush()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def chain_after(path: Path, steps: int, beginning: tuple[int, str]) -> str | None:
    """The chain of the line after which so many steps are made; None where there is no such line.

    `beginning`: the run's first step, and the chain before it.
    """
    return beginning[1] if steps == beginning[0] else _line_of(path, steps - 1)[1]


def cut(path: Path, steps: int, first: int) -> bool:
    """Leave the lines of the steps from the run's `first` to before `steps`. Were there more?"""
    if not path.exists():
        return False
    end = _line_of(path, steps - 1)[0] if steps > first else 0
    more = end < path.stat().st_size
    os.truncate(path, end)
    return more


def last_line(path: Path) -> dict[str, Any] | None:
    """The last entry of a JSON-lines file."""
    for line in _lines_from_the_end(path) if path.exists() else ():
        if line.strip():
            entry: dict[str, Any] = json.loads(line)
            return entry
    return None


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a JSON-lines file, none where there is no file, without a last one that is torn.

    Raises RunDirError where a line before it cannot be read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise RunDirError(f"{path} line {number}: cannot be read; see distrib verify") from None
                return
            yield entry


def _line_of(path: Path, step: int) -> tuple[int, str | None]:
    """Where the line of `step` ends, and its chain: looked for from the end of the file, where a resume finds it."""
    end = path.stat().st_size if path.exists() else 0
    for line in _lines_from_the_end(path) if end else ():
        try:
            entry = json.loads(line)
        except ValueError:  # torn
            entry = {}
        if entry.get("step") == step:
            return end, entry.get("chain")
        end -= len(line)
    return 0, None


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """With their line ends; the first may have none."""
    rest = b""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place:
            size = min(place, 1 << 16)
            place = file.seek(place - size)
            lines = (file.read(size) + rest).splitlines(keepends=True)
            rest = lines[0]
            yield from reversed(lines[1:])
    yield rest


def link(chain: str, text: str) -> str:
    """The chain after a line whose JSON text without its chain is `text`."""
    return hashlib.sha256(f"{chain}{text}".encode()).hexdigest()


def to_json(entry: dict[str, Any], indent: int | None = None) -> str:
    """JSON, on one line unless indented. Floats that are not finite become null: JSON has no word for them."""
    if indent is None:
        return _ONE_LINE(_finite(entry))
    return json.dumps(_finite(entry), indent=indent, allow_nan=False)


def now() -> str:
    """As it is written into a run folder."""
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
