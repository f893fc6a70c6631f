"""Decisions that follow from the evaluations: when a run stops, which checkpoint is its best, when the rate is reduced.

Each is a function of the lines of evals.jsonl, so it is the same for any number of processes and after interruptions.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distrib.config import Config
from distrib.decision_options import BestConfig, PlateauConfig, StopConfig
from distrib.errors import ConfigError, did_you_mean
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION

Evaluation = dict[str, Any]  # a line of evals.jsonl


def read_evaluations(run: RunDir) -> list[Evaluation]:
    """Return the valid lines of the run's evals.jsonl. Damaged ones are reported in `run.trouble`."""
    return list(read_lines(run.evals, EVALUATION, run.trouble))


def criteria(config: Config) -> dict[str, BestConfig | StopConfig | PlateauConfig | None]:
    """Return the sections of the config that name a metric, by their keys."""
    return {
        "train.stop": config.train.stop,
        "checkpoint.best": config.checkpoint.best,
        "optim.plateau": config.optim.plateau,
    }


def records(evaluations: Sequence[Evaluation], criterion: BestConfig | StopConfig) -> list[tuple[int, float]]:
    """Return step and value of each evaluation that was better than all before it."""
    found: list[tuple[int, float]] = []
    for _, best, _ in _walk(evaluations, criterion):
        if best is not None and best not in found[-1:]:
            found.append(best)
    return found


def stopped(evaluations: Sequence[Evaluation], stop: StopConfig | None) -> dict[str, Any] | None:
    """Return the details of the `stopped` event at the first evaluation after which the run stops; None if it goes
    on."""
    if stop is None:
        return None
    for evaluation, best, waited in _walk(evaluations, stop):
        if waited >= stop.patience and evaluation["step"] >= stop.min_steps:
            step, value = best or (None, None)
            record = "it was never finite" if best is None else f"the best was {value:.6g} after step {step}"
            return {
                "step": evaluation["step"],
                "metric": stop.metric,
                "best_step": step,
                "best_value": value,
                "reason": f"{stop.metric} has not improved in {waited} evaluation(s); {record}",
            }
    return None


def best(evaluations: Sequence[Evaluation], config: Config) -> dict[str, Any] | None:
    """Return metric, mode, value and step of the best evaluation, by `checkpoint.best`, else by `train.stop`."""
    criterion = config.checkpoint.best or config.train.stop
    if criterion is None or not (found := records(evaluations, criterion)):
        return None
    step, value = found[-1]
    return {"metric": criterion.metric, "mode": criterion.mode, "value": value, "step": step}


def require_criterion(run: RunDir, config: Config) -> None:
    """Raise ConfigError if the run has no best checkpoint, because nothing says what is better."""
    if config.checkpoint.best is None and config.train.stop is None:
        raise ConfigError(
            f"--checkpoint best: the config of {run.path} has neither checkpoint.best nor train.stop; give newest or a "
            "step"
        )


def chosen_step(run: RunDir, which: str, option: str = "--checkpoint") -> int | None:
    """Return the step that `option` names: None for newest. Raises ConfigError if it names none."""
    if which == "newest":
        return None
    if which == "best":
        if (found := best(read_evaluations(run), run.read_config())) is None:
            raise ConfigError(
                f"{option} best: no evaluation of {run.path} was the best by its checkpoint.best or train.stop; "
                "give newest or a step"
            )
        return int(found["step"])
    if not which.isdecimal():
        raise ConfigError(f"{option}: {which} is not newest, best or a step")
    return int(which)


def plateau_factor(evaluations: Sequence[Evaluation], plateau: PlateauConfig | None) -> float:
    """Return the factor of the learning rate after these evaluations."""
    if plateau is None:
        return 1.0
    factor, best, waited, cooling = 1.0, None, 0, 0
    for evaluation in evaluations:
        if plateau.metric not in evaluation["metrics"]:  # of another evaluation set
            continue
        value = evaluation["metrics"][plateau.metric]
        best, waited = (value, 0) if _is_better(value, best, plateau) else (best, waited + 1)
        if cooling:
            cooling, waited = cooling - 1, 0
        if waited > plateau.patience:
            factor = max(factor * plateau.factor, plateau.min_lr_ratio)
            cooling, waited = plateau.cooldown, 0
    return factor


def require_metrics(config: Config, metrics: Iterable[str]) -> None:
    """Raise ConfigError if a decision of the config needs a metric that is not among these."""
    known = sorted(metrics)
    for key, criterion in criteria(config).items():
        if criterion is not None and criterion.metric not in known:
            raise ConfigError(
                f"{key}.metric: {criterion.metric} is not among the metrics of an evaluation: {', '.join(known)}"
                + did_you_mean(criterion.metric, known)
            )


def _walk(
    evaluations: Sequence[Evaluation], criterion: BestConfig | StopConfig
) -> Iterator[tuple[Evaluation, tuple[int, float] | None, int]]:
    """Yield each evaluation, step and value of the best so far, and the number of evaluations since.

    Of equal values the earliest is the best. Evaluations without the metric are passed over.
    """
    found: tuple[int, float] | None = None
    waited = 0
    for evaluation in evaluations:
        if criterion.metric not in evaluation["metrics"]:  # of another evaluation set
            continue
        value = evaluation["metrics"][criterion.metric]
        if _is_better(value, found and found[1], criterion):
            found, waited = (evaluation["step"], value), 0
        else:
            waited += 1
        yield evaluation, found, waited


def _is_better(value: float | None, best: float | None, criterion: BestConfig | StopConfig | PlateauConfig) -> bool:
    """Return whether a value is better than the best so far. One that is not finite is never better."""
    if value is None or not math.isfinite(value):
        return False
    min_delta = 0.0 if isinstance(criterion, BestConfig) else criterion.min_delta
    return best is None or (value < best - min_delta if criterion.mode == "min" else value > best + min_delta)
