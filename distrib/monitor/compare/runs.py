"""Reads runs from run folders, or from wandb's offline folders, into one form."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from distrib.config import Config
from distrib.config_yaml import flatten
from distrib.data.prints import Fingerprint
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.trackers.wandb_files import offline_folders, read_offline
from distrib.run_folder.decisions import chosen_step
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION, EVENT, STEP
from distrib.run_folder.ledger import or_nan, own_numbers
from distrib.run_folder.sample_files import names_of

Steps: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = npt.NDArray[np.float64]

_HASH_DIGITS = 12  # shown of a hash, as git does
_OF_A_START = ("world_size", "strategy", "launcher", "hosts")
_ENDS = ("started", "finished", "failed", "preempted")


@dataclass(frozen=True)
class Curve:
    """A number over the steps. `steps`: steps done, ascending; `values`: NaN if not finite; both of shape (points,)."""

    steps: Steps
    values: Values

    @classmethod
    def of(cls, steps: Sequence[int], values: Iterable[float | None]) -> "Curve":
        numbers = np.array([or_nan(value) for value in values], dtype=np.float64)
        return cls(np.array(steps, dtype=np.int64), np.where(np.isfinite(numbers), numbers, np.nan))


@dataclass(frozen=True)
class Digests:
    """Digests of the samples that each step read; `steps` as in Curve."""

    steps: Steps
    values: npt.NDArray[np.bytes_]

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[str]) -> "Digests":
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype="S16"))


@dataclass(frozen=True)
class Run:
    """What one run recorded. `config` is flat; `identity` is the part of it that decides what is computed. `code` and
    `machine` describe the environment; if that changed between starts, a value lists the starts' in turn."""

    name: str
    state: str
    config: dict[str, Any]
    identity: dict[str, Any]
    code: dict[str, str]
    machine: dict[str, str]
    restarts: int
    curves: dict[str, Curve]
    seconds: Curve  # time spent in steps so far
    samples: Digests
    data: dict[str, Fingerprint | None] = field(default_factory=dict)  # by the set's name; empty if none is recorded
    trouble: tuple[str, ...] = ()  # what could not be read
    at: int | None = None  # the steps done at the checkpoint that was asked for; None: at the end
    sample_files: dict[str, tuple[int, Path]] = field(default_factory=dict)  # the newest of each name, and its step

    @property
    def global_batch_size(self) -> int | None:
        """None if the config has no such key, because another program made the run."""
        size = self.config.get("data.global_batch_size")
        return size if isinstance(size, int) else None


def load_runs(paths: Sequence[Path], checkpoint: str = "newest") -> list[Run]:
    """Load runs, each with a name of its own. `checkpoint`: newest, best or a step. Raises RunDirError, ConfigError."""
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise RunDirError(f"{' '.join(map(str, paths))}: give two runs or more, each once")
    runs = [_load(path, checkpoint) for path in paths]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(path))
        for run, path in zip(runs, paths, strict=True)
    ]


def _load(path: Path, checkpoint: str) -> Run:
    if not path.is_dir():
        raise RunDirError(f"{path}: no such folder; give run folders, for example runs/digits")
    if os.path.lexists(path / "config.yaml") or (path / "checkpoints").is_dir():
        return _from_run_folder(path, checkpoint)
    if folders := offline_folders(path):
        if checkpoint != "newest":
            raise ConfigError(f"--checkpoint {checkpoint}: {path} is a folder of wandb, which has no checkpoints")
        return _from_wandb(folders)
    raise RunDirError(f"{path}: not a run: neither config.yaml of a run folder nor run-*.wandb of wandb is in it")


def _from_run_folder(path: Path, checkpoint: str) -> Run:
    run = RunDir(path)
    config = run.read_config()
    environment = run.environment_or_nothing() if run.has_begun() else {}
    columns = _columns(run, ("step", "loss", "lr", "grad_norm", "seconds", "samples"))
    done = [step + 1 for step in columns["step"]]
    curves = {f"train/{key}": Curve.of(done, columns[key]) for key in ("loss", "lr", "grad_norm")}
    curves |= {key: Curve.of(done, values) for key, values in columns.items() if key.startswith("train/")}
    evals = list(read_lines(run.evals, EVALUATION, run.trouble))
    for key in dict.fromkeys(key for entry in evals for key in entry["metrics"]):
        having = [entry for entry in evals if key in entry["metrics"]]
        curves[key] = Curve.of([entry["step"] for entry in having], [entry["metrics"][key] for entry in having])
    size = config.data.global_batch_size
    curves["perf/samples_per_second"] = Curve.of(
        done, [size / seconds if seconds else None for seconds in columns["seconds"]]
    )
    state, at = _state(run), chosen_step(run, checkpoint)
    if at is not None and at > max([0, *done]):
        raise ConfigError(f"--checkpoint {checkpoint}: {path} has {max([0, *done])} steps; give one of them")
    sample_files: dict[str, tuple[int, Path]] = {}
    for entry in evals:
        if at is None or entry["step"] <= at:
            sample_files |= {name: (entry["step"], file) for name, file in names_of(run.samples, entry).items()}
    return Run(
        name=path.resolve().name,
        state=state,
        config=config.flat() | _beginning(environment),
        identity=config.identity() | _beginning(environment),
        **_facts(environment),
        curves=curves,
        seconds=Curve.of(done, np.cumsum(columns["seconds"], dtype=np.float64)),
        samples=Digests.of(done, columns["samples"]),
        data=environment.get("data") or {},
        trouble=tuple(run.take_trouble()),
        at=at,
        sample_files=sample_files,
    )


def _columns(run: RunDir, keys: Sequence[str]) -> dict[str, list[Any]]:
    """Return the ledger's values by key, in the order of the steps. If a step has two lines, the later one counts.

    The task's own numbers (`train/NAME`) come too; None stands for lines that lack one.
    """
    columns: dict[str, list[Any]] = {key: [] for key in keys}
    for number, line in enumerate(read_lines(run.steps, STEP, run.trouble)):
        own = own_numbers(line)
        for key in own:
            columns.setdefault(key, [None] * number)
        for key, column in columns.items():
            column.append(line[key] if key in keys else own.get(key))
    steps = np.array(columns["step"], dtype=np.int64)
    if (np.diff(steps) > 0).all():
        return columns
    run.report(f"{run.steps}: damaged: its steps are not in order; see distrib verify")
    _, last = np.unique(steps[::-1], return_index=True)
    return {key: [column[len(steps) - 1 - place] for place in last] for key, column in columns.items()}


def _state(run: RunDir) -> str:
    events = [event["event"] for event in read_lines(run.events, EVENT, run.trouble) if event["event"] in _ENDS]
    if not events:
        return "not begun"
    if events[-1] != "started":
        return str(events[-1])
    return "running" if run.held() else "unfinished"


def _from_wandb(folders: list[Path]) -> Run:
    """Join the folders of one run, one folder a start. Steps that a later start computed again count once."""
    parts = [read_offline(folder) for folder in folders]
    last = parts[-1]
    history: list[dict[str, Any]] = []
    for part in parts:
        first = part.history[0]["_step"] if part.history else math.inf
        history = [entry for entry in history if entry["_step"] < first] + part.history
    values = dict(last.config)
    ours = values.pop("distrib", None)
    starts = [part.config["distrib"] for part in parts if "distrib" in part.config]
    environment = {**ours, "starts": starts} if ours else {}
    flat = flatten(values)
    try:
        identity = Config.from_dict(values).identity()
    except ConfigError:  # another program's config: any key may decide what is computed
        identity = flat
    before = 0 if ours is not None else 1  # others' `_step` counts from 0
    keys = dict.fromkeys(key for entry in history for key in entry if not key.startswith("_"))
    curves = {key: curve for key in keys if (curve := _curve(history, key, before)) is not None}
    if not curves:
        raise RunDirError(f"{folders[-1]}: nothing to compare, there is no number in this run's history")
    if (seconds := curves.pop("perf/step_seconds", None)) is not None:
        seconds = Curve(seconds.steps, np.nancumsum(seconds.values))
    else:
        seconds = _curve(history, "_timestamp", before)
        seconds = Curve(seconds.steps, seconds.values - seconds.values[0]) if seconds else Curve.of([], [])
    if last.preempting:
        state = "preempted"
    elif last.exit_code is None:
        state = "unfinished"
    else:
        state = "finished" if last.exit_code == 0 else "failed"
    return Run(
        name=last.name or last.id,
        state=state,
        config=flat | _beginning(environment),
        identity=identity | _beginning(environment),
        **{**_facts(environment), "restarts": len(folders) - 1},
        curves=curves,
        seconds=seconds,
        samples=Digests.of([], []),
        data=environment.get("data") or {},
    )


def _curve(history: list[dict[str, Any]], key: str, before: int) -> Curve | None:
    """Return the curve of a key, with the last value of each step; None if it has no numbers."""
    points = {
        entry["_step"] + before: entry[key]
        for entry in history
        if isinstance(entry.get(key), int | float) and not isinstance(entry[key], bool)
    }
    return Curve.of(sorted(points), [points[step] for step in sorted(points)]) if points else None


def _beginning(environment: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the run's result besides its config."""
    origin, source = environment.get("forked_from"), environment.get("init")
    return {
        **({"init.sha256": source["sha256"][:_HASH_DIGITS]} if source else {}),
        **({"training_samples": environment["training_samples"]} if "training_samples" in environment else {}),
        **({"forked_from": f"{origin['path']} {origin['chain'][:_HASH_DIGITS]}"} if origin else {}),
    }


def _facts(environment: dict[str, Any]) -> dict[str, Any]:
    starts = environment.get("starts", [])
    code, machine = (_of_starts(starts, key, environment.get(key, {})) for key in ("versions", "machine"))
    identities = [start.get("code") or {"git_commit": environment.get("git_commit")} for start in starts]
    for key in ("git_commit", "uncommitted", "task", "strategy"):
        code[key] = _each([_identity(identity, key) for identity in identities])
    machine = {key: _each([start.get(key) for start in starts]) for key in _OF_A_START} | machine
    return {"code": _known(code), "machine": _known(machine), "restarts": max(len(starts) - 1, 0)}


def _of_starts(starts: list[dict[str, Any]], key: str, otherwise: dict[str, Any]) -> dict[str, str | None]:
    """Return the facts under `key`, over all starts. Older run folders have only the newest start's (`otherwise`)."""
    facts = [start.get(key, otherwise) for start in starts]
    return {name: _each([of.get(name) for of in facts]) for name in dict.fromkeys(name for of in facts for name in of)}


def _identity(identity: dict[str, str | None], key: str) -> str | None:
    value = identity.get(key)
    if key == "uncommitted" and key in identity and identity.get("git_commit") is not None and value is None:
        return "nothing"
    return None if value is None else value[:_HASH_DIGITS]


def _each(values: list[Any]) -> str | None:
    """Join the values of the starts, `a, then b` where they change; None if one is not known."""
    texts = [json.dumps(value) if isinstance(value, list) else str(value) for value in values]
    changes = [text for place, text in enumerate(texts) if place == 0 or text != texts[place - 1]]
    return None if None in values or not values else ", then ".join(changes)


def _known(facts: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items() if value is not None}
