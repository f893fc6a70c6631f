"""Classes that the config names by a short name: distrib's own, and those of installed packages (entry points)."""

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from distrib.errors import ConfigError
from distrib.targets import find
from distrib.tracebacks import first_line, place

STRATEGIES = "distrib.strategies"
# The names of distrib's own are here and nowhere else. To list them imports none of them.
_OWN = {
    STRATEGIES: {
        "single": "distrib.strategies.ddp:DDP",
        "ddp": "distrib.strategies.ddp:DDP",
        "zero0": "distrib.strategies.deepspeed:ZeRO0",
        "zero1": "distrib.strategies.deepspeed:ZeRO1",
        "zero2": "distrib.strategies.deepspeed:ZeRO2",
        "zero3": "distrib.strategies.deepspeed:ZeRO3",
        "fsdp2": "distrib.strategies.fsdp2:FSDP2",
        "hsdp": "distrib.strategies.hsdp:HSDP",
    },
}
_BASE = {STRATEGIES: "distrib.strategies.base:Strategy"}


def own_names(group: str) -> list[str]:
    """The names of distrib's own."""
    return list(_OWN[group])


def names(group: str) -> list[str]:
    """The names of a group, distrib's own first. A package cannot take one of these."""
    return [*_OWN[group], *sorted({point.name for point in entry_points(group=group)} - set(_OWN[group]))]


def is_there(group: str, name: str) -> bool:
    """Return whether a name is in the group. A name with a colon, `module:Class`, is looked for when it is loaded."""
    return ":" in name or name in _OWN[group] or name in names(group)


def load(group: str, name: str, key: str) -> Any:
    """Import the class of that name, or `module:Class` of the user's own.

    `key`: where the config names it. Raises ConfigError if it cannot be imported or is no class of that kind, and
    LookupError if there is no such name.
    """
    if own := _OWN[group].get(name):
        return _imported(own)
    base = _imported(_BASE[group])
    if ":" in name:
        return find(name, key, base)
    point = _entry_point(group, name, key)
    try:
        found = point.load()
    except Exception as error:
        raise ConfigError(
            f"{key}: {name}, {_origin(point)}, cannot be loaded: {first_line(error)}{place(error)}"
        ) from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"{key}: {name}, {_origin(point)}, does not derive from {base.__name__}")
    return found


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _entry_point(group: str, name: str, key: str) -> EntryPoint:
    """Raises LookupError if no package brings the name, and ConfigError if several do."""
    found = {point.value: point for point in entry_points(group=group, name=name)}
    if not found:
        raise LookupError(name)
    if len(found) > 1:
        several = " and ".join(sorted(_origin(point) for point in found.values()))
        raise ConfigError(f"{key}: {name} is {several}; uninstall one of them")
    return next(iter(found.values()))


def _origin(point: EntryPoint) -> str:
    package = f" of the package {point.dist.name}" if point.dist else ""
    return f"{point.value}{package}"
