"""Classes with a short name: distrib's own, and those that installed packages bring by entry points."""

import functools
from importlib import import_module
from typing import Any, NamedTuple

from distrib.errors import DistribError

SCHEDULERS, STRATEGIES = "distrib.schedulers", "distrib.strategies"  # the groups of entry points
# distrib's own have no need of an entry point. To list them imports none of them.
OWN = {
    SCHEDULERS: {
        "slurm": "distrib.processes.schedulers.slurm:Slurm",
        "kubernetes": "distrib.processes.schedulers.kubernetes:Kubernetes",
    },
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


class PluginError(DistribError):
    """A class that a package brings cannot be used."""


class Plugin(NamedTuple):
    target: str  # module:Class
    package: str


@functools.cache
def plugins(group: str) -> dict[str, Plugin]:
    """Return the classes of a group by name, distrib's own first. Raises PluginError if two packages bring a name."""
    from importlib.metadata import entry_points  # takes its time, which `distrib --help` does not need

    found = {name: Plugin(target, "distrib") for name, target in OWN[group].items()}
    entries = [(entry.name, entry.dist.name if entry.dist else "?", entry.value) for entry in entry_points(group=group)]
    for name, package, value in sorted(entries):
        other = found.setdefault(name, Plugin(value, package))
        if other.target != value:
            raise PluginError(f"{other.package} and {package} both bring {name} to {group}; uninstall one of them")
    return found


def load(group: str, name: str, base: type[Any]) -> Any:
    """Import the class of that name. Raises KeyError if there is none, and PluginError if it cannot be imported or
    does not derive from `base`."""
    target, package = plugins(group)[name]
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:
        from distrib.tracebacks import first_line, place

        reason = f"{first_line(error)}{place(error)}"
        raise PluginError(f"{name} of {package} ({target}) cannot be loaded: {reason}") from None
    if not isinstance(found, type) or not issubclass(found, base):
        raise PluginError(f"{name} of {package} ({target}) is no class that derives from {base.__name__}")
    return found
