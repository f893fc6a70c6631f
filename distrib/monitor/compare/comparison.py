"""Finds what differs between runs, from which step on and why, and how far each got."""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distrib.errors import and_more
from distrib.monitor.compare.runs import Curve, Run, Steps, Values
from distrib.monitor.metrics import lower_is_better
from distrib.run_folder.identity import difference, order_difference

# The relative difference that rounding alone can cause between two losses. For fp32 it is what this project promises
# between numbers of processes (tests/distributed/test_parity.py); for bf16 and fp16 it is one rounding to their bits.
ROUNDING = {"no": 1e-5, "fp16": 2.0**-11, "bf16": 2.0**-8}

_LOSSES = ("train/loss", "loss", "train_loss")  # the last two: other programs' names
_EVALUATED = ("eval", "val", "test")  # prefixes of metrics that have a best value; distrib's own is eval/
_EVALUATED_LOSSES = ("eval/loss", "val/loss", "val_loss", "test/loss", "test_loss")
_OUT_OF_PROPORTION = 10  # an evaluation's loss that differs by this many times more than any step's is no rounding
_LAST = sys.maxsize  # after every step
# Keys that decide the order of the samples, if the code is the same.
_DECIDE_ORDER = ("seed", "data.global_batch_size", "data.limit", "training_samples")
_ACT_THROUGH_RATE = ("optim.schedule.", "optim.warmup_steps.", "train.steps.", "train.epochs.")
_MOST_REASONS = 5
_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Difference:
    """A fact that differs between runs. `decides`: it is a config key that decides what is computed."""

    section: str
    key: str
    values: list[str]  # one a run
    decides: bool


@dataclass(frozen=True)
class Divergence:
    """Where a run diverges from the first one, over the steps that both have. Steps count from 0, as in steps.jsonl."""

    steps: int  # that both have
    samples: int | None  # the first step that read other samples
    samples_known: bool
    loss: int | None  # the first step with another loss, to the bit
    beyond_rounding: int | None  # the first step whose loss differs by more than `rounding`, relatively
    rounding: float
    largest: float  # relative difference
    evaluation: int | None  # the first evaluation, by the steps done before it, with another metric, to the bit
    cause: str  # nothing, data order, config, data, code, numerics, not recorded
    because: str


@dataclass(frozen=True)
class Figures:
    """How far a run got. `best`: value and steps done, for each evaluated metric."""

    steps: int
    final: dict[str, float]
    best: dict[str, tuple[float, int]]
    samples_per_second: float | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """`divergences`: one for each run but the first, from the first."""

    runs: list[Run]
    differences: list[Difference]
    divergences: list[Divergence]
    figures: list[Figures]


def compare(runs: list[Run]) -> Comparison:
    """Compare all runs with the first one."""
    return Comparison(
        runs=runs,
        differences=differences(runs),
        divergences=[diverge(runs[0], run) for run in runs[1:]],
        figures=[figures(run) for run in runs],
    )


def differences(runs: list[Run]) -> list[Difference]:
    """Find what differs between any two runs in config, code and environment."""
    found = []
    for section, facts, absent in (
        ("config", [run.config for run in runs], "not given"),
        ("code", [run.code for run in runs], _NOT_RECORDED),
        ("environment", [run.machine for run in runs], _NOT_RECORDED),
    ):
        for key in dict.fromkeys(key for fact in facts for key in fact):
            values = [_show(fact[key]) if key in fact else absent for fact in facts]
            if len(set(values) - {_NOT_RECORDED}) > 1 and key != "name" and not key.startswith("tracking."):
                decides = section == "config" and any(key in run.identity for run in runs)
                found.append(Difference(section, key, values, decides))
    return found


def diverge(first: Run, other: Run) -> Divergence:
    """Find where `other` diverges from `first`, and why, as far as the two folders show."""
    both, at, there = _in_both(first.samples.steps, other.samples.steps)
    samples = _first(both - 1, first.samples.values[at] != other.samples.values[there])
    steps, ours, theirs = _together(first, other, _LOSSES)
    apart = relative_difference(ours, theirs)
    rounding = max(_rounding(first), _rounding(other))
    loss, beyond = _first(steps, apart > 0), _first(steps, apart > rounding)
    largest = float(apart.max(initial=0))
    evaluations = _evaluations(first, other)
    evaluation = evaluations.first_that_differs
    # Losses that diverge by rounding do not show why they diverge by more later on.
    seen = loss if beyond is None else beyond
    by_order = samples is not None and (beyond is None or samples <= beyond)
    if beyond is None and not by_order and evaluations.loss_apart > max(rounding, _OUT_OF_PROPORTION * largest):
        cause, because = _cause(first, other, _LAST, False, False)
        because = f"evaluations part, not the training: {because}"
    elif seen is None and not by_order and evaluation is not None:
        cause, because = _cause(first, other, _LAST, False, evaluations.loss_apart > 0)
        because = f"evaluations part, not the training: {because}"
    elif seen is None and not by_order:
        cause, because = "nothing", _the_same(len(steps), evaluations.number)
    else:
        until = samples if by_order else seen
        assert until is not None, "samples or losses differ"
        cause, because = _cause(first, other, until, by_order, loss != beyond)
    return Divergence(len(steps), samples, len(both) > 0, loss, beyond, rounding, largest, evaluation, cause, because)


@dataclass(frozen=True)
class _Evaluations:
    """How evaluations of two runs differ, compared after equal numbers of steps."""

    number: int
    first_that_differs: int | None  # to the bit, in any metric
    loss_apart: float  # the largest relative difference of their losses


def _evaluations(first: Run, other: Run) -> _Evaluations:
    compared: set[int] = set()
    differing: set[int] = set()
    loss_apart = 0.0
    for key in first.curves.keys() & other.curves.keys():
        if not key.startswith(_EVALUATED):
            continue
        steps, at, there = _in_both(first.curves[key].steps, other.curves[key].steps)
        apart = relative_difference(first.curves[key].values[at], other.curves[key].values[there])
        compared.update(steps.tolist())
        differing.update(steps[apart > 0].tolist())
        if key in _EVALUATED_LOSSES:
            loss_apart = max(loss_apart, float(apart.max(initial=0)))
    return _Evaluations(len(compared), min(differing, default=None), loss_apart)


def _the_same(steps: int, evaluations: int) -> str:
    if not steps:
        return "no step has a loss in both"
    return f"the same to the last bit over {steps} steps" + (f" and {evaluations} evaluations" if evaluations else "")


def relative_difference(ours: Values, theirs: Values) -> Values:
    """Return the differences relative to the larger of two values, shape (steps,).

    0 if they are equal or both NaN, infinite if only one is NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        apart = np.abs(ours - theirs) / np.maximum(np.abs(ours), np.abs(theirs))
    apart = np.where(np.isnan(ours) != np.isnan(theirs), math.inf, apart)
    return np.where((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)), 0.0, apart)


def _cause(first: Run, other: Run, parted: int, by_order: bool, began_by_rounding: bool) -> tuple[str, str]:
    """Return cause and reason of a difference that first shows in the step `parted`."""
    config = _changes(first.identity, other.identity)
    if _same_rate_until(first, other, parted):
        config = {key: change for key, change in config.items() if not f"{key}.".startswith(_ACT_THROUGH_RATE)}
    code, machine = (_changes(*_known(*facts)) for facts in ((first.code, other.code), (first.machine, other.machine)))
    data = {} if config.keys() & set(_DECIDE_ORDER) else _data_changes(first, other, parted == _LAST)
    if by_order:
        cause, reasons = "data order", {key: change for key, change in config.items() if key in _DECIDE_ORDER}
        if "training_samples" in reasons or not reasons:  # the cause of that
            reasons |= _order_changes(first, other)
            reasons |= {key: change for key, change in config.items() if key.startswith("task.")} or code
        unknown = "nothing recorded explains it: distrib verify shows which run is not in order"
    elif config or data or code:
        cause, reasons = next(found for found in (("config", config), ("data", data), ("code", code)) if found[1])
        unknown = ""
    elif began_by_rounding:
        cause, reasons, unknown = "numerics", machine, "the order of floating-point sums: nothing recorded differs"
    else:
        cause, reasons, unknown = _NOT_RECORDED, {}, "more than rounding at once: data, running statistics, randomness?"
    because = and_more([f"{key} {change}" for key, change in reasons.items()], _MOST_REASONS) or unknown
    too = [key for key in config | data | code | machine if key not in reasons]
    return cause, because + (f"; differing too: {and_more(too, _MOST_REASONS)}" if too else "")


def _data_changes(first: Run, other: Run, evaluated: bool) -> dict[str, str]:
    """Return how the recorded samples differ: of the training set and, if `evaluated`, of the evaluation set too."""
    found = {
        f"task.{name}": difference(other.data.get(name), prints, f"in {first.name}")
        for name, prints in first.data.items()
        if name == "train_dataset" or evaluated
    }
    return {key: change for key, change in found.items() if change is not None}


def _order_changes(first: Run, other: Run) -> dict[str, str]:
    ours, theirs = (run.data.get("train_dataset") for run in (first, other))
    text = order_difference(theirs, ours, f"in {first.name}") if ours and theirs else None
    return {} if text is None else {"task.train_dataset": text}


def figures(run: Run) -> Figures:
    """Return the last value of each metric, the best, and the speed."""
    results = {
        key: curve
        for key, curve in run.curves.items()
        if (key in _LOSSES or key.startswith(_EVALUATED)) and not np.isnan(curve.values).all()
    }
    best = {}
    for key, curve in results.items():
        if key not in _LOSSES:
            place = int(np.nanargmin(curve.values) if lower_is_better(key) else np.nanargmax(curve.values))
            best[key] = (float(curve.values[place]), int(curve.steps[place]))
    clock = run.seconds
    rate = None  # without the first step, which is slow everywhere
    if run.global_batch_size is not None and len(clock.steps) > 1 and clock.values[-1] > clock.values[0]:
        rate = run.global_batch_size * int(clock.steps[-1] - clock.steps[0]) / float(clock.values[-1] - clock.values[0])
    return Figures(
        steps=max((int(curve.steps[-1]) for curve in run.curves.values() if len(curve.steps)), default=0),
        final={key: float(curve.values[place]) for key, curve in results.items() if (place := _place(run, curve)) >= 0},
        best=best,
        samples_per_second=rate,
        seconds=float(clock.values[-1]) if len(clock.steps) else 0.0,
    )


def _place(run: Run, curve: Curve) -> int:
    """Return the index of the curve's last point, up to the run's checkpoint if one was chosen; -1: there is none."""
    return (len(curve.steps) if run.at is None else int(np.searchsorted(curve.steps, run.at, "right"))) - 1


def _show(value: Any) -> str:
    """Format a config's value as YAML and JSON do."""
    return value if isinstance(value, str) else json.dumps(value)


def _together(first: Run, other: Run, keys: tuple[str, ...]) -> tuple[Steps, Values, Values]:
    """Return the steps that both have, counted from 0, and both runs' values, for the first key that both have."""
    nothing = Curve.of([], [])
    key = next((key for key in keys if key in first.curves and key in other.curves), None)
    ours, theirs = (run.curves[key] if key else nothing for run in (first, other))
    steps, at, there = _in_both(ours.steps, theirs.steps)
    return steps - 1, ours.values[at], theirs.values[there]


def _in_both(ours: Steps, theirs: Steps) -> tuple[Steps, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the steps that both have, and their indices in each."""
    return np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)


def _same_rate_until(first: Run, other: Run, step: int) -> bool:
    """Return whether all learning rates before `step` are the same: they decide its loss."""
    steps, ours, theirs = _together(first, other, ("train/lr",))
    return bool(len(steps)) and bool((ours[steps < step] == theirs[steps < step]).all())


def _first(steps: Steps, where: npt.NDArray[np.bool_]) -> int | None:
    return int(steps[where][0]) if where.any() else None


def _rounding(run: Run) -> float:
    precisions = (run.config.get("train.mixed_precision"), run.config.get("strategy.communication_dtype"))
    return max(ROUNDING.get(str(precision), ROUNDING["no"]) for precision in precisions)


def _changes(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    """Return the keys whose values differ, with both values. A missing key counts as null."""
    return {
        key: f"{_show(ours.get(key))} → {_show(theirs.get(key))}"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key) and not (key == "torch" and _same_release(ours.get(key), theirs.get(key)))
    }


def _same_release(ours: Any, theirs: Any) -> bool:
    """Return whether two torch versions are one release, and one lacks the build (2.11.0+cu130), as in old runs."""
    releases = [str(version).partition("+") for version in (ours, theirs)]
    return releases[0][0] == releases[1][0] and not all(build for _, _, build in releases)


def _known(ours: dict[str, str], theirs: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Keep the keys that both folders have: an older one, or wandb's, may have fewer."""
    both = ours.keys() & theirs.keys()
    return {key: ours[key] for key in ours if key in both}, {key: theirs[key] for key in theirs if key in both}
