"""The sections of the config that decide by evaluations: train.stop, checkpoint.best and optim.plateau."""

from typing import Annotated, Literal

from pydantic import Field

from distrib.config_section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class StopConfig(Section):
    """The run stops when `metric` has not improved by more than `min_delta` in `patience` evaluations in a row."""

    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    patience: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.0
    min_steps: NonNegativeInt = 0  # the run does not stop before


class BestConfig(Section):
    """An evaluation that finds a better `metric` than all before it saves its step, which is kept."""

    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    keep: PositiveInt = 1  # how many of the best


class PlateauConfig(Section):
    """The rate is multiplied by `factor` each time `metric` has not improved in more than `patience` evaluations in a
    row. Then `cooldown` evaluations are not counted. As torch's ReduceLROnPlateau with threshold_mode abs."""

    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: NonNegativeInt = 10
    min_delta: NonNegativeFloat = 0.0
    cooldown: NonNegativeInt = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
