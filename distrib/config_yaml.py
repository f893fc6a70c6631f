"""Reads and writes configs as YAML: no tags, limited size, and only values that can be written back unchanged."""

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from distrib.errors import ConfigError

MAX_BYTES = 4 * 2**20  # of a file
MAX_DEPTH = 64  # of nested sections and lists
MAX_VALUES = 10_000
MAX_CHARACTERS = 200_000  # of all strings and keys together
_MAX_NODES = 4 * MAX_VALUES  # a key is a node too
_MAX_SHOWN = 200  # characters of a value in an error message
_MAX_HALF = 300  # characters at each end of a shortened line
INTEGERS = range(-(2**63), 2**64)

_STANDARD = yaml.SafeLoader.yaml_implicit_resolvers
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$")
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """A YAML loader without YAML 1.1's surprises.

    `no`, `off` and 2026-01-01 are strings, and 1e-3 is a number. A key is a string, and may not appear twice.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # number of nodes below each finished node, to count aliases in full

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _error(f"{event.tag}: values are written without tags", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} nested sections or lists", event)
        before = self._nodes
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"*{event.anchor} is inside the value that it refers to", event)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MAX_NODES:
            raise _error(f"more than {MAX_VALUES} values", event)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != f"{_PREFIX}str":
                what = f"the key {shown(key.value)}" if isinstance(key, yaml.ScalarNode) else "this key"
                raise _error(f"{what} is not a string; put it in quotes", key)
            if key.value in seen:
                raise _error(f"key {shown(key.value)} appears twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 40 or (value := int(node.value.replace("_", ""))) not in INTEGERS:
            raise _error(f"{shown(node.value)} does not fit into 64 bits", node)
        return value


def _resolvers(added: dict[str, list[tuple[str, re.Pattern[str]]]]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the patterns by which an unquoted scalar is read as a bool, int or float instead of a string."""
    resolvers = {first: list(found) for first, found in added.items()}
    for kind, pattern, firsts in (
        ("bool", _BOOL, "tTfF"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789."),
    ):
        for first in firsts:
            resolvers.setdefault(first, []).append((f"{_PREFIX}{kind}", pattern))
    return resolvers


class _Dumper(yaml.SafeDumper):
    """Quotes each string that this loader or a standard YAML loader would not read as a string."""


_Loader.yaml_implicit_resolvers = _resolvers(
    {first: [one for one in found if one[0] == f"{_PREFIX}null"] for first, found in _STANDARD.items()}
)
_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_yaml_int)
_Dumper.yaml_implicit_resolvers = _resolvers(_STANDARD)


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read(path: Path) -> str:
    """Return the text of a config file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: more than {MAX_BYTES >> 20} MiB; a config is smaller than that")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ConfigError(f"{one_line(str(path))}: cannot read the config: {reason}") from None


def parse(text: str, source: str) -> Any:
    """Parse a YAML text. Raises ConfigError: one line that names `source` and the line number."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(one_line(f"{source}: {where}not valid YAML: {problem}")) from None


def dump(values: dict[str, Any]) -> str:
    """Return a YAML text that `parse`, and any standard YAML loader, reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def plain(values: Any) -> Any:
    """Return a copy of `values` that has only None, booleans, numbers, strings, lists and dictionaries.

    Raises ConfigError for any other type, and for values that are too many, too long or too deeply nested.
    """
    left = [MAX_VALUES, MAX_CHARACTERS]

    def copy(value: Any, key: str, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ConfigError(f"more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{shown(key)}: more than {MAX_DEPTH} nested sections or lists")
        if value is None or isinstance(value, bool | BaseModel):
            return value
        if isinstance(value, int):
            if value not in INTEGERS:
                raise ConfigError(f"{key}: a number that does not fit into 64 bits")
            return int(value)
        if isinstance(value, float):
            if value != value:
                raise ConfigError(f"{key}: nan is not allowed, because it never equals itself; write null for none")
            return float(value)
        if isinstance(value, str | os.PathLike):
            return text(os.fspath(value), key)
        if isinstance(value, list | tuple):
            return [copy(inner, f"{key}.{index}", depth + 1) for index, inner in enumerate(value)]
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise ConfigError(
                        f"{key}: the key {shown(name)} is not a string; put it in quotes".removeprefix(": ")
                    )
            prefix = f"{key}." if key else ""
            return {text(name, key): copy(inner, f"{prefix}{name}", depth + 1) for name, inner in value.items()}
        raise ConfigError(f"{key}: a {type(value).__name__}; a config holds numbers, texts, lists and dictionaries")

    def text(value: Any, key: str) -> str:
        left[1] -= len(value)
        if left[1] < 0:
            raise ConfigError(f"{key}: more than {MAX_CHARACTERS} characters in all")
        try:
            value.encode()
        except (UnicodeEncodeError, AttributeError):
            raise ConfigError(f"{key}: {shown(value)} is not valid Unicode text") from None
        return str(value)

    return copy(values, "", 0)


def shown(value: object) -> str:
    """Return a value as an error message shows it: one short line."""
    if isinstance(value, int) and value not in INTEGERS:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return one_line(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")


def one_line(text: str) -> str:
    """Escape unprintable characters, and cut out the middle of a long text."""
    text = text if len(text) <= 2 * _MAX_HALF else f"{text[:_MAX_HALF]}…{text[-_MAX_HALF:]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
