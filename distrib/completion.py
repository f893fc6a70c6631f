"""What the shell offers when a user presses Tab: configs, run folders, config keys and their values.

Typer installs it: distrib --install-completion. `before`: the words of the same argument that are complete.
"""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from distrib.config import Config
from distrib.plugins import OWN, STRATEGIES
from distrib.schedule import SCHEDULES
from distrib.schedule_options import known_keys as schedule_keys
from distrib.strategy_options import known_keys as strategy_keys

_SUFFIXES = (".yaml", ".yml")
# Those of torch.optim; importing torch would take seconds.
OPTIMIZERS = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam", "radam", "rmsprop"),
    *("rprop", "sgd", "sparseadam"),
)
_IN_A_RUN_FOLDER = ("config.yaml", "checkpoints")


def configs(before: list[str], incomplete: str) -> list[str]:
    """Return YAML files and folders; those in configs/ too, if nothing is typed yet."""
    return _paths(incomplete, "configs", lambda path: path.suffix in _SUFFIXES)


def configs_and_scripts(before: list[str], incomplete: str) -> list[str]:
    """Return the configs and Python scripts that `distrib launch` takes, and a config's keys after one."""
    if before:
        return overrides(before, incomplete) if before[0].endswith(_SUFFIXES) else []
    return _paths(incomplete, "configs", lambda path: path.suffix in (*_SUFFIXES, ".py"))


def run_folders(before: list[str], incomplete: str) -> list[str]:
    """Return run folders, and folders to look for them in; those in runs/ too, if nothing is typed yet."""
    return _paths(incomplete, "runs", lambda path: any((path / name).exists() for name in _IN_A_RUN_FOLDER))


def overrides(before: list[str], incomplete: str) -> list[str]:
    """Return the config's keys as `key=`; after `key=` its values, if there are only a few.

    bash takes = for the end of a word: then the key is the last of what is `before`, or a = is.
    """
    values = _values()
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in values.get(key, ()) if value.startswith(begun)]
    key = next((word for word in reversed(before) if word != "="), "")
    if key in values:
        return [value for value in values[key] if value.startswith(incomplete)]
    return [f"{key}=" for key in values if key.startswith(incomplete)]


def _paths(incomplete: str, usual: str, wanted: Any) -> list[str]:
    """Return folders (with a / at the end), and paths that are `wanted`, whose beginning is typed."""
    found = []
    typed = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    folders = [typed] if incomplete else [Path(), Path(usual)]
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            text = str(path) if not incomplete.startswith("./") else f"./{path}"
            if text.startswith(incomplete) and not path.name.startswith("."):
                found += [text] if wanted(path) else [f"{text}/"] if path.is_dir() else []
    return found


def _values() -> dict[str, list[str]]:
    """Return each key of the config, dotted, and its values, if they are a few words."""
    names = {"strategy.name": list(OWN[STRATEGIES]), "optim.schedule": list(SCHEDULES), "optim.name": list(OPTIMIZERS)}
    return {**dict(_walk(Config, "")), **{key: [] for key in (*strategy_keys(), *schedule_keys())}, **names}


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[str]]]:
    for name, field in section.model_fields.items():
        key, (words, within) = f"{prefix}{field.alias or name}", _of(field.annotation)
        for part in within:
            yield from _walk(part, f"{key}.")
        if not within:
            yield key, words


def _of(annotation: Any) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the words that a key may have, and the sections that may stand there."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [_of(part) for part in get_args(annotation)]
        return [word for words, _ in parts for word in words], [section for _, within in parts for section in within]
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)], []
    if annotation is bool:
        return ["true", "false"], []
    return [], [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
