"""The config's `optim.groups`: parameters that are trained with other values than the rest, or not at all."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from distrib import schedule_options
from distrib.config_section import NonNegativeFloat, PositiveInt, Section
from distrib.errors import ConfigError, did_you_mean
from distrib.schedule import Factor

KEY, REST = "optim.groups", -1  # the latter: the place of parameters that are in no group
Rate = Annotated[float, Field(ge=0, lt=1)]
OF_A_CLASS = ("betas", "momentum", "options")  # what a group of another class does not take from the section
VALUES = ("name", "lr", "weight_decay", *OF_A_CLASS)  # what a group may have of its own


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Globs = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(_one_or_several)]


class GroupConfig(Section):
    """The parameters whose names fit `match`, a glob or a list of globs.

    A key that is left out has the section's value; but with another `name`, betas, momentum and options are that
    class's own defaults.
    """

    match: Annotated[Globs, Field(min_length=1)]
    ndim: PositiveInt | None = None  # only parameters of so many dimensions
    name: str | None = None
    lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    betas: Annotated[tuple[Rate, Rate] | None, Field(strict=False)] = None
    momentum: NonNegativeFloat | None = None
    options: dict[str, Any] | None = None
    schedule: schedule_options.OfAGroup | None = None
    freeze: bool = False  # not trained

    def fits(self, name: str, ndim: int) -> bool:
        """Return whether a parameter of this name, with so many dimensions, is in the group."""
        return (self.ndim is None or self.ndim == ndim) and any(fnmatchcase(name, glob) for glob in self.match)


def group_of(groups: Sequence[GroupConfig], name: str, ndim: int) -> int:
    """Return the place of the first group that a parameter fits into; REST if there is none."""
    return next((number for number, group in enumerate(groups) if group.fits(name, ndim)), REST)


def own_factors(groups: Sequence[GroupConfig], warmup_steps: int, num_updates: int) -> dict[int, Factor]:
    """Return the factor of the rate of each group that has a schedule of its own, by the group's place. Raises
    ConfigError. `warmup_steps`: goes before, as before `optim.schedule`, except before a list of pieces."""
    found = {}
    for number, group in enumerate(groups):
        if (given := group.schedule) is not None:
            before, key = 0 if isinstance(given, tuple) else warmup_steps, f"{KEY}.{number}.schedule"
            found[number] = schedule_options.curve(given, before, num_updates, key).factor
    return found


def require_members(groups: Sequence[GroupConfig], parameters: Sequence[tuple[str, int]]) -> None:
    """Raise ConfigError if a group has no parameter. `parameters`: name and number of dimensions of each."""
    taken = {group_of(groups, name, ndim) for name, ndim in parameters}
    names = [name for name, _ in parameters]
    for number, group in enumerate(groups):
        if number in taken:
            continue
        key = f"{KEY}.{number}.match"
        fitting = [name for name, ndim in parameters if group.fits(name, ndim)]
        if fitting:
            first = group_of(groups, fitting[0], dict(parameters)[fitting[0]])
            raise ConfigError(
                f"{key}: {', '.join(group.match)} matches only parameters of earlier groups ({fitting[0]} is in "
                f"{KEY}.{first}); put this group first, or leave it out"
            )
        if any(fnmatchcase(name, glob) for name in names for glob in group.match):
            raise ConfigError(f"{key}: {', '.join(group.match)} matches no parameter with ndim {group.ndim}")
        hint = did_you_mean(group.match[0].replace("*", ""), names, f"; there are {', '.join(names[:5])}, …")
        raise ConfigError(f"{key}: {', '.join(group.match)} matches no parameter of the model{hint}")
