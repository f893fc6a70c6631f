"""Merges a config file with its bases and with `key=value` overrides, and knows which of them a value came from.

`base: other.yaml` names one file or a list, relative to the file that names them. Later files win over earlier ones, a
file over its bases, overrides over all. Mappings merge key by key; any other value, also a list, is replaced. A file
that is reached more than once counts once, before all files that name it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distrib import config_yaml
from distrib.config_section import meant_key
from distrib.config_yaml import MAX_DEPTH, one_line, shown
from distrib.errors import ConfigError

BASE = "base"
COMMAND_LINE = "command line"
MAX_FILES = 100  # that one config is merged from
_EITHER_OR = {"steps": "epochs", "epochs": "steps"}  # of the section train: these exclude each other


@dataclass(frozen=True)
class Layer:
    """What one file says, without its key `base`."""

    path: Path
    values: dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """The files of a config, each before those that win over it, and overrides. The last is the config itself."""

    layers: Sequence[Layer]
    overrides: Sequence[str] = ()

    def merge(self, root: type[BaseModel]) -> dict[str, Any]:
        """Return what files and overrides come to. `root`: the config, for hints. Raises ConfigError."""
        values: dict[str, Any] = {}
        for layer in self.layers:
            values = merged(values, layer.values)
        for override in self.overrides:
            _apply(values, override, root)
        return values

    def is_one_file(self) -> bool:
        return len(self.layers) == 1 and not self.overrides

    def rows(self, values: dict[str, Any]) -> list[tuple[str, Any, str]]:
        """Return key, value and source of each of the `values`, which are those that `merge` returned."""
        return [(".".join(keys), value, self._source(keys)) for keys, value in _leaves(values)]

    def where(self, key: str) -> str:
        """Return how an error about a dotted key names its file. For an override, that is the config itself."""
        own, keys = self.layers[-1], tuple(key.split("."))
        having = [layer for layer in self.layers if _has(layer.values, keys)]
        several = len(having) > 1 and isinstance(_value(having[-1].values, keys), dict)
        if not having or having[-1] is own or several or self._overridden(keys):
            return str(own.path)
        return f"{having[-1].path}, a base of {own.path}"

    def _source(self, keys: tuple[str, ...]) -> str:
        if self._overridden(keys):
            return COMMAND_LINE
        having = [layer for layer in self.layers if _has(layer.values, keys)]
        # A schedule that a file gives by its name alone is a section once an override gives it an option.
        return str(having[-1].path) if having else self._source(keys[:-1])

    def _overridden(self, keys: tuple[str, ...]) -> bool:
        given = (tuple(override.partition("=")[0].split(".")) for override in self.overrides)
        return any(keys[: len(one)] == one for one in given)


def read(path: Path, overrides: Sequence[str] = ()) -> Sources:
    """Read a config file and its bases. Raises ConfigError."""
    reader = _Reader()
    reader.read(path, ())
    return Sources(reader.layers, overrides)


def mapping(text: str, path: Path) -> dict[str, Any]:
    """Parse the YAML text of the file at `path`. Raises ConfigError."""
    values = config_yaml.parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, this is a {type(values).__name__}")
    return values


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the values of two files, where `over` wins. Changes neither."""
    result = _merged(under, over)
    section = over.get("train")
    if isinstance(section, dict) and isinstance(under.get("train"), dict):
        for key, other in _EITHER_OR.items():
            if section.get(key) is not None and other not in section:
                result["train"].pop(other, None)
    return result


@dataclass
class _Reader:
    """Reads files depth first, so that each comes after its bases."""

    layers: list[Layer] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def read(self, path: Path, chain: tuple[Path, ...]) -> None:
        """`chain`: the files that lead here, each the base of the one before."""
        same = _identity(path)
        if same in (cycle := [_identity(one) for one in chain]):
            shown_chain = " -> ".join(str(one) for one in (*chain[cycle.index(same) :], path))
            raise ConfigError(one_line(f"{chain[-1]}: base: files that are bases of each other: {shown_chain}"))
        if same in self.seen:
            return
        self.seen.add(same)
        if len(self.seen) > MAX_FILES:
            raise ConfigError(one_line(f"{chain[-1]}: base: the config is merged from more than {MAX_FILES} files"))
        try:
            text = config_yaml.read(path)
        except ConfigError as error:
            raise ConfigError(one_line(f"{error}; {chain[-1]} names it as a base") if chain else str(error)) from None
        values = mapping(text, path)
        for base in _bases(values, path):
            self.read(path.parent / base, (*chain, path))
        if chain:  # the values of the config itself are checked together with overrides
            try:
                values = config_yaml.plain(values)
            except ConfigError as error:
                raise ConfigError(one_line(f"{path}, a base of {chain[-1]}: {error}")) from None
        self.layers.append(Layer(path, values))


def _bases(values: dict[str, Any], path: Path) -> list[str]:
    """Take the key `base` out of the values."""
    given = values.pop(BASE, [])
    bases = given if isinstance(given, list) else [given]
    for base in bases:
        if not isinstance(base, str) or not base:
            raise ConfigError(
                one_line(f"{path}: base: {shown(base)} is not the path of a config; give base: other.yaml, or a list")
            )
    return bases


def _identity(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # reading it fails in words
        return str(path)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def _apply(values: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    """Set one key. Copies the sections that lead to it, which belong to a file's values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown(override)}: an override is written key=value, for example optim.lr=0.01")
    if key == BASE:
        raise ConfigError(f"{shown(override)}: a base is named in a config file, not on the command line")
    *sections, last = key.split(".")
    if sections == ["train"] and last in _EITHER_OR and isinstance(train := values.get("train"), dict):
        values["train"] = {other: value for other, value in train.items() if other != _EITHER_OR[last]}
    for section in sections:
        inner = values.get(section, {})
        if section == "schedule" and key.startswith("optim.schedule.") and isinstance(inner, str):
            inner = {"name": inner}  # a schedule's plain name gets options
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{shown(override)}: {section} is a value, not a section, so {key} cannot be set in it"
                + meant_key((section,), inner, root)
            )
        values[section] = dict(inner)
        values = values[section]
    values[last] = config_yaml.parse(text, override)


def _leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and len(above) < MAX_DEPTH:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


_NOTHING = object()


def _value(values: Any, keys: tuple[str, ...]) -> Any:
    """Return the value at nested keys; for a place in a list, the list."""
    for key in keys:
        if isinstance(values, list):
            return values
        if not isinstance(values, dict) or key not in values:
            return _NOTHING
        values = values[key]
    return values


def _has(values: dict[str, Any], keys: tuple[str, ...]) -> bool:
    return _value(values, keys) is not _NOTHING
