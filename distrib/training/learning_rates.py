"""The learning rate of an update: the config's schedule, or the task's own function."""

import math
from collections.abc import Callable

from distrib.config import Config, OptimConfig
from distrib.config_yaml import shown
from distrib.errors import ConfigError
from distrib.task import Task, own_method
from distrib.tracebacks import users_lines

_TRIED = 100  # updates of the run, before it starts
_INSTEAD = ("schedule", "warmup_steps", "lr")  # keys that a task's own function replaces

LearningRate = Callable[[int, float], float]  # of an update, given the base rate: that of the optimizer's first group


def learning_rate(task: Task, config: Config, num_updates: int) -> LearningRate:
    """Return the function that each step calls with the number of updates made so far. Raises ConfigError.

    `optim.plateau` is a further factor, which follows from the evaluations: see training/evaluations.py.
    """
    own = own_method(task, "learning_rate")
    if own is None:
        factor = config.optim.curve(num_updates).factor
        return lambda update, base_rate: base_rate * factor(update)
    _refuse_both(task, config.optim)

    def rate(update: int, base_rate: float) -> float:
        return _checked(own(update, num_updates), update)

    for update in tried_updates(num_updates):
        first, second = (_tried(rate, update) for _ in range(2))
        if first != second:
            raise ConfigError(
                f"task.learning_rate: returned {first:g} for update {update}, and then {second:g}; return a function "
                "of update and num_updates alone, so that a resumed run has the same rates"
            )
    return rate


def tried_updates(num_updates: int) -> list[int]:
    """Return the updates for which a task's own function is tried before the run starts."""
    return sorted({0, num_updates - 1, *range(0, num_updates, -(-num_updates // _TRIED))})


def _refuse_both(task: Task, optim: OptimConfig) -> None:
    """Only values that are not the default count as given, because a run's config.yaml has all keys."""
    for key in _INSTEAD:
        value = getattr(optim, key)
        if value != OptimConfig.model_fields[key].default:
            given = value if isinstance(value, str | int | float) else "given"
            raise ConfigError(
                f"optim.{key}: {given}, and {type(task).__name__}.learning_rate returns the rate of each update; "
                "leave out one of the two"
            )


def _tried(rate: LearningRate, update: int) -> float:
    try:
        return rate(update, 0.0)
    except ConfigError:
        raise
    except Exception as error:
        if (lines := users_lines(error)) is None:
            raise
        raise ConfigError(f"task.learning_rate failed for update {update}\n{lines}") from error


def _checked(value: object, update: int) -> float:
    try:
        rate = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < math.inf or isinstance(value, str):
        raise ConfigError(
            f"task.learning_rate: returned {shown(value)} for update {update}; return the learning rate, a finite "
            "number that is 0 or more"
        )
    return rate
