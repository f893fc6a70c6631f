"""steps.jsonl: one line a step, append-only, each line chained to all before it.

`chain` is the SHA-256 of the previous line's chain and this line's text without its chain, so that a line which is
changed, dropped or repeated afterwards breaks every later one.
"""

import hashlib
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

GENESIS = ""  # the chain before the first line
_ONE_LINE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Ledger:
    """Appends to a JSON-lines file; each line is handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self.chain = GENESIS
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


def link(chain: str, text: str) -> str:
    """The chain after a line whose JSON text without its chain is `text`."""
    return hashlib.sha256(f"{chain}{text}".encode()).hexdigest()


def to_json(entry: dict[str, Any], indent: int | None = None) -> str:
    """JSON, on one line unless indented. Floats that are not finite become null: JSON has no word for them."""
    if indent is None:
        return _ONE_LINE(_finite(entry))
    return json.dumps(_finite(entry), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
