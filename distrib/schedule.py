"""The learning rate schedules: each class has the options of one, and the factor that follows from them.

A factor is between 0 and 1. The base rate is multiplied by it. It is a pure function of the number of updates made.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from distrib.config_section import PositiveFloat, PositiveInt, Section
from distrib.errors import ConfigError

Factor = Callable[[int], float]  # of an update, counted from 0
Ratio = Annotated[float, Field(ge=0, le=1)]  # to optim.lr
Divisor = Annotated[float, Field(ge=1, le=1e30, allow_inf_nan=False)]


class Schedule(Section):
    """A schedule's options. Updates are counted from the first of the run, or of the piece in a list of pieces."""

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        """Return the factor from update `begin` on, where it is `high`, to `end`, which is one past the last update."""
        raise NotImplementedError

    def check(self, key: str, begin: int, end: int) -> None:
        """Raise ConfigError if the options do not fit into the updates from `begin` to `end`. `key`: the schedule's."""

    def landmarks(self, begin: int, end: int) -> list[int]:
        """Return the updates at which the schedule bends."""
        return [begin]


class Constant(Schedule):
    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        return lambda update: high


class Falling(Schedule):
    """Falls to `min_lr_ratio`, which it would reach at `end`."""

    min_lr_ratio: Ratio = 0.0

    def shape(self) -> Callable[[float], float]:
        """Return a function that falls from 1 to 0 while its argument rises from 0 to 1."""
        raise NotImplementedError

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        low, fall, length, shape = self.min_lr_ratio, high - self.min_lr_ratio, max(1, end - begin), self.shape()

        def factor(update: int) -> float:
            if update <= begin:
                return high
            return low + fall * shape(min(1.0, (update - begin) / length))

        return factor


class Linear(Falling):
    def shape(self) -> Callable[[float], float]:
        return _linear


class Cosine(Falling):
    def shape(self) -> Callable[[float], float]:
        return _cosine


class Polynomial(Falling):
    power: PositiveFloat = 1.0

    def shape(self) -> Callable[[float], float]:
        power = self.power
        return lambda done: (1.0 - done) ** power


class WSD(Falling):
    """Warmup, stable, decay: falls over the last `decay_steps` updates alone."""

    decay_steps: PositiveInt
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"

    def shape(self) -> Callable[[float], float]:
        return {"linear": _linear, "cosine": _cosine, "1-sqrt": lambda done: 1.0 - math.sqrt(done)}[self.decay_type]

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        return super().factor(end - self.decay_steps, end, high)

    def check(self, key: str, begin: int, end: int) -> None:
        if self.decay_steps > end - begin:
            raise ConfigError(f"{key}.decay_steps: {self.decay_steps}, but {_room(begin, end)}; give fewer")

    def landmarks(self, begin: int, end: int) -> list[int]:
        return [begin, end - self.decay_steps]


class InverseSqrt(Schedule):
    """Falls with the inverse square root of the updates made: to 1/2 after three times `timescale` updates."""

    timescale: PositiveInt | None = None  # none: the length of the warmup, or 10,000

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        scale = self.timescale or begin or 10_000
        return lambda update: high * math.sqrt(scale / (update - begin + scale))


class OneCycle(Schedule):
    """torch's OneCycleLR without its cycle of the momentum. It reaches its end at the last update, as torch's does."""

    pct_start: Ratio = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: Divisor = 25.0
    final_div_factor: Divisor = 1e4
    three_phase: bool = False

    def _phases(self, length: int) -> list[tuple[float, float]]:
        """Return where each phase ends, and the factor there."""
        low, rise = 1.0 / self.div_factor, self.pct_start * length
        back = [(2 * rise - 2, low)] if self.three_phase else []
        return [(rise - 1, 1.0), *back, (length - 1, low / self.final_div_factor)]

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        shape = _cosine if self.anneal_strategy == "cos" else _linear
        low, (*phases, last) = 1.0 / self.div_factor, self._phases(end)

        def factor(update: int) -> float:
            since, before = 0.0, low
            for until, after in phases:
                if update <= until:
                    break
                since, before = until, after
            else:
                until, after = last
            done = min(1.0, (update - since) / (until - since)) if until > since else 1.0
            return high * (after + (before - after) * shape(done))

        return factor

    def check(self, key: str, begin: int, end: int) -> None:
        if begin:
            raise ConfigError(
                f"optim.warmup_steps: {begin}, and one_cycle warms up by itself ({key}.pct_start); leave it out"
            )
        if self.three_phase and self.pct_start > 0.5:
            raise ConfigError(
                f"{key}.pct_start: {self.pct_start}, and with three_phase the rate takes as long to fall again; give "
                "at most 0.5"
            )

    def landmarks(self, begin: int, end: int) -> list[int]:
        return [max(0, round(until)) for until, _ in self._phases(end)]


class Step(Schedule):
    """Multiplied by `gamma` after each `step_size` updates, counted from the first, warmup included."""

    step_size: PositiveInt
    gamma: Ratio = 0.1

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        size, gamma = self.step_size, self.gamma
        return lambda update: high * gamma ** (update // size)

    def check(self, key: str, begin: int, end: int) -> None:
        if self.step_size >= end:
            raise ConfigError(
                f"{key}.step_size: {self.step_size}, but {_room(0, end)}, so that the rate would never fall; give less"
            )
        if self.step_size < begin:
            raise ConfigError(
                f"{key}.step_size: {self.step_size}, but the warmup takes {begin} updates (optim.warmup_steps); give "
                "at least as many"
            )

    def landmarks(self, begin: int, end: int) -> list[int]:
        return [begin, self.step_size]


class MultiStep(Schedule):
    """Multiplied by `gamma` at each milestone: updates, counted from the first, warmup included."""

    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
    gamma: Ratio = 0.1

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        for before, after in pairwise(milestones):
            if after <= before:
                raise ValueError(f"{after} comes after {before}; give them in increasing order, each once")
        return milestones

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        milestones, gamma = self.milestones, self.gamma
        return lambda update: high * gamma ** bisect_right(milestones, update)

    def check(self, key: str, begin: int, end: int) -> None:
        if self.milestones[-1] >= end:
            raise ConfigError(f"{key}.milestones: {self.milestones[-1]}, but {_room(0, end)}; leave it out")
        if self.milestones[0] < begin:
            raise ConfigError(
                f"{key}.milestones: {self.milestones[0]}, but the warmup takes {begin} updates (optim.warmup_steps); "
                "give at least as many"
            )

    def landmarks(self, begin: int, end: int) -> list[int]:
        return [begin, *self.milestones]


class Warmup(Schedule):
    """A piece that rises from `min_lr_ratio`, in the way of `optim.warmup_steps`."""

    min_lr_ratio: Ratio = 0.0

    def factor(self, begin: int, end: int, high: float = 1.0) -> Factor:
        return warmup(self.min_lr_ratio, high, end)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "inverse_sqrt": InverseSqrt,
    "wsd": WSD,
    "one_cycle": OneCycle,
    "step": Step,
    "multistep": MultiStep,
}
PIECES: dict[str, type[Schedule]] = {"warmup": Warmup, **SCHEDULES}


def warmup(low: float, high: float, steps: int) -> Factor:
    """Return a factor that rises linearly. It is above `low` at once, and reaches `high` after `steps` updates."""
    rise = high - low
    return lambda update: low + rise * ((update + 1) / (steps + 1))


def _linear(done: float) -> float:
    return 1.0 - done


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _room(begin: int, end: int) -> str:
    after = " after the warmup (optim.warmup_steps)" if begin else ""
    return f"there are {max(0, end - begin)} updates{after}"


def option_names(schedules: dict[str, type[Any]]) -> list[str]:
    """Return the options of these schedules, each once."""
    return list(dict.fromkeys(key for one in schedules.values() for key in one.model_fields))
