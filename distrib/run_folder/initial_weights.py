"""Compares the tensors of `init.from` with those of the model, by name and shape, before a run begins."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distrib.config_yaml import one_line
from distrib.errors import ConfigError, did_you_mean
from distrib.init_options import InitConfig, fits
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard, load, named_state
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import steps_of
from distrib.run_folder.weight_sources import WeightSource, find

_MOST_SHOWN = 4
_BLOCK = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class InitialWeights:
    """What a run takes from a source. Names are the model's, also those of the source after `init.rename`.

    A run that resumes takes nothing: `before` is what its environment.json has of the source that it began with.
    """

    source: WeightSource | None  # none: a resumed run's, which is gone
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)  # entries as in a manifest; of tied names the first
    missing: list[str] = field(default_factory=list)  # in the model alone
    unexpected: list[str] = field(default_factory=list)  # in the source alone
    left_out: list[str] = field(default_factory=list)  # of either, by include and exclude
    before: dict[str, Any] | None = None

    def manifest(self) -> dict[str, Any]:
        """Return a manifest from which a strategy loads as from a checkpoint without optimizer state."""
        tensors = {f"model.{name}": entry for name, entry in self.loaded.items()}
        return {"tensors": tensors, "partial": True, "numbers": {}, "applied": 0, "loss_scale": None}

    def record(self, world: World) -> dict[str, Any] | None:
        """Return what environment.json has of it, with the digest of the source, if it is there. Collective.

        Raises ConfigError.
        """
        if self.source is None:
            return self.before
        found = self.before or {
            "step": self.source.step,
            "loaded": [*self.loaded],
            "missing": self.missing,
            "unexpected": self.unexpected,
            "left_out": self.left_out,
        }
        return {**found, "path": str(self.source.place.absolute()), "sha256": self.source.digest(world)}

    def lines(self) -> list[str]:
        """Describe it on a few lines."""
        assert self.source is not None, "only what a run takes is described"
        elements = sum(prod(entry["shape"]) for entry in self.loaded.values())
        lines = [
            f"initial weights from {self.source.place}",
            f"  loaded:      {_listed(self.loaded)}, {elements:,} elements",
            f"  missing:     {_listed(self.missing, ', which keep the values from Task.model')}",
            f"  unexpected:  {_listed(self.unexpected, ', which are not read')}",
            f"  left out:    {_listed(self.left_out, ', by init.include and init.exclude')}",
        ]
        return [one_line(line) for line in lines]


def check(options: InitConfig | None, run: RunDir, module: nn.Module, forked: bool) -> InitialWeights | None:
    """Return what the run takes from its source; None if it has none. Reads no values. Call it on rank 0.

    A run with a checkpoint, its own or that of a fork, reads that and takes nothing. If its source is there, it is only
    compared with the one that the run began with. Raises ConfigError.
    """
    if options is None or forked:
        return None
    begun = any(steps_of(run.checkpoints))  # then a checkpoint has a copy of environment.json
    environment = run.environment_or_nothing() if begun or os.path.lexists(run.environment) else {}
    if environment.get("forked_from"):
        return None
    if not begun:
        return compare(options, module)
    before, began = environment.get("init"), run.read_config().init
    if before is None or began is None:  # refused as another run, or environment.json is damaged
        return None
    try:  # a run may have trained on since, so `newest` means what it meant then
        source = find(options, before["step"] if began.checkpoint == options.checkpoint else None)
        return InitialWeights(source, before=before)
    except ConfigError as error:
        if (began.source, began.checkpoint) != (options.source, options.checkpoint):
            raise ConfigError(one_line(str(error))) from None
        return InitialWeights(None, before=before)


def compare(options: InitConfig, module: nn.Module) -> InitialWeights:
    """Find the source, and compare it with the model. Raises ConfigError."""
    try:
        return match(find(options), options, module)
    except ConfigError as error:  # paths and names may have any characters
        raise ConfigError(one_line(str(error))) from None


def match(source: WeightSource, options: InitConfig, module: nn.Module) -> InitialWeights:
    """Find what each of the model's tensors is loaded from. Raises ConfigError if names or shapes do not fit."""
    named, tied = named_state(module)
    entries = _renamed(source, options)
    known = [*named, *tied]
    _require_use(options, source, [*dict.fromkeys([*entries, *known])])
    names_of = {first: [first, *(name for name in tied if tied[name] == first)] for first in named}
    loaded: dict[str, dict[str, Any]] = {}
    missing, unfit = list[str](), list[str]()
    for first, names in names_of.items():
        if there := [name for name in names if name in entries and options.selects(name)]:
            if problem := _misfit(source, there[0], entries[there[0]], named[first]):
                unfit.append(problem)
                continue
            for other in there[1:]:
                _require_equal(source, there[0], other, entries)
            loaded[first] = entries[there[0]]
        elif any(options.selects(name) for name in names):
            missing.append(first)
    if unfit:
        more = f" (and {len(unfit) - 1} more)" if unfit[1:] else ""
        raise ConfigError(f"init.from: {unfit[0]}{more}")
    others = [name for name in entries if name not in names_of and name not in tied]
    unexpected = [name for name in others if options.selects(name)]
    left_out = [name for name in dict.fromkeys([*named, *entries]) if name not in loaded and not options.selects(name)]
    if not loaded:
        hint = did_you_mean(known[0], entries, f"; the source has {_listed(entries)}")
        raise ConfigError(f"init.from: {source.place} has none of the model's tensors, such as {known[0]}{hint}")
    if options.strict:
        _require_all(source, missing, unexpected)
    return InitialWeights(source, loaded, missing, unexpected, left_out)


def _renamed(source: WeightSource, options: InitConfig) -> dict[str, dict[str, Any]]:
    """Return the source's entries by their names in the model."""
    entries: dict[str, dict[str, Any]] = {}
    before: dict[str, str] = {}
    for name, entry in source.tensors.items():
        new = options.renamed(name)
        if new in entries:
            raise ConfigError(f"init.rename: {before[new]} and {name} of {source.place} both become {new}")
        entries[new], before[new] = entry, name
    return entries


def _require_use(options: InitConfig, source: WeightSource, names: list[str]) -> None:
    """Raise ConfigError for a pattern that matches nothing. `names`: those of the model and of the renamed source."""
    for begin in options.rename:
        if not any(name.startswith(begin) for name in source.tensors):
            hint = did_you_mean(begin, _beginnings(source.tensors), f"; the source has {_listed(source.tensors)}")
            raise ConfigError(f"init.rename: no name in {source.place} begins with {begin!r}{hint}")
    for key, globs in {"init.include": options.include, "init.exclude": options.exclude}.items():
        for glob in globs:
            if not any(fits(name, [glob]) for name in names):
                hint = did_you_mean(
                    glob.replace("*", ""), [*_beginnings(names), *names], f"; there are {_listed(names)}"
                )
                raise ConfigError(f"{key}: {glob} matches no name of the model or of {source.place}{hint}")


def _beginnings(names: Iterable[str]) -> list[str]:
    """Return every beginning of a name that ends with a dot."""
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(f"{'.'.join(part[:n])}." for part in parts for n in range(1, len(part))))


def _misfit(source: WeightSource, name: str, entry: dict[str, Any], tensor: Tensor) -> str | None:
    """Return why a tensor of the source cannot be copied into the model's, or None."""
    dtype, own = getattr(torch, entry["dtype"], None), str(tensor.dtype).removeprefix("torch.")
    if entry["shape"] != list(tensor.shape):
        what = f"has the shape {entry['shape']} in {source.place}, and {list(tensor.shape)}"
    elif not isinstance(dtype, torch.dtype) or _kind(dtype) != _kind(tensor.dtype):
        what = f"is {entry['dtype']} in {source.place}, and {own}"
    else:
        return None
    return f"{name} {what} in the model; leave it out: init.exclude: [{name}]"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _require_equal(source: WeightSource, name: str, other: str, entries: dict[str, dict[str, Any]]) -> None:
    """Raise ConfigError if two tensors of the source that are one in the model differ. Reads a block at a time."""
    one, two = entries[name], entries[other]
    if one == two:
        return
    shape, manifest = tuple(one["shape"]), {"tensors": {name: one, other: two}}
    count = prod(shape)
    same = one["dtype"] == two["dtype"] and one["shape"] == two["shape"]
    for first in range(0, count if same else 0, _BLOCK):
        values = [torch.empty(min(_BLOCK, count - first), dtype=getattr(torch, one["dtype"])) for _ in range(2)]
        load(source.folder, manifest, {key: Shard(values[i], shape, first) for i, key in enumerate((name, other))})
        same = same and torch.equal(*(part.view(torch.uint8) for part in values))
    if not same:
        raise ConfigError(
            f"init.from: {name} and {other} are one tensor in the model, and differ in {source.place}; leave one out: "
            f"init.exclude: [{other}]"
        )


def _require_all(source: WeightSource, missing: list[str], unexpected: list[str]) -> None:
    """Raise ConfigError if a name is in the model or in the source alone."""
    problems = []
    if missing:
        hint = did_you_mean(missing[0], unexpected)
        problems.append(f"lacks {len(missing)} of the model's tensors, first {missing[0]}{hint}")
    if unexpected:
        hint = did_you_mean(unexpected[0], missing)
        problems.append(f"has {len(unexpected)} that the model has not, first {unexpected[0]}{hint}")
    if problems:
        raise ConfigError(
            f"init.from: {source.place} {', and '.join(problems)}; set init.rename, init.exclude or init.strict: false"
        )


def _listed(names: Iterable[str], note: str = "") -> str:
    """Return the number of names, the first few, and a note if there are some."""
    found = list(names)
    more = ", …" if len(found) > _MOST_SHOWN else ""
    return f"{len(found):,} ({', '.join(found[:_MOST_SHOWN])}{more}){note}" if found else "none"
