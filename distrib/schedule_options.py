"""`optim.schedule` as the config has it: a name, a section with a name and options, or a list of pieces."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator, ValidationError

from distrib.config_section import PositiveInt, Section, explain, nearest
from distrib.config_yaml import shown
from distrib.errors import ConfigError, did_you_mean
from distrib.schedule import PIECES, SCHEDULES, Factor, Ratio, Schedule, option_names, warmup

_KEY = "optim.schedule"


class Place(Section):
    """The keys that every piece has. `steps`: none in the last piece takes the rest of the run."""

    steps: PositiveInt | None = None
    max_lr_ratio: Ratio = 1.0  # what it begins with, or rises to; in place of 1


@dataclass(frozen=True)
class Named:
    """A schedule by its name."""

    name: str
    schedule: Schedule

    def written(self) -> dict[str, Any]:
        """Return it as the config has it, with every default."""
        return {"name": self.name, **self.schedule.model_dump(mode="json")}


@dataclass(frozen=True)
class Piece(Named):
    """A schedule for a part of the run."""

    place: Place

    def written(self) -> dict[str, Any]:
        return {"name": self.name, **self.place.model_dump(mode="json"), **self.schedule.model_dump(mode="json")}


# A name alone stands for a schedule with its defaults, however it was written.
Given: TypeAlias = str | Named | tuple[Piece, ...]


def parse(value: Any) -> Given:
    """Check the value of `optim.schedule`. Raises ConfigError."""
    if isinstance(value, Named) or (isinstance(value, tuple) and all(isinstance(one, Piece) for one in value)):
        return value
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"{_KEY}: an empty list; give at least one piece, for example [{{name: cosine}}]")
        pieces = tuple(_piece(f"{_KEY}.{number}", one) for number, one in enumerate(value))
        for number, piece in enumerate(pieces[:-1]):
            if piece.place.steps is None:
                raise ConfigError(f"{_KEY}.{number}.steps: missing; only the last piece may leave it out")
        return pieces
    named = _named(_KEY, value, SCHEDULES)
    fields = type(named.schedule).model_fields
    as_by_default = all(getattr(named.schedule, key) == field.default for key, field in fields.items())
    return named.name if as_by_default else named


def written(given: Given) -> Any:
    """Return the value of `optim.schedule` for a file."""
    if isinstance(given, str):
        return given
    return given.written() if isinstance(given, Named) else [piece.written() for piece in given]


@dataclass(frozen=True)
class Curve:
    """The factor of each update of a run, and the updates at which it bends."""

    factor: Factor
    landmarks: tuple[int, ...]


def curve(given: Given, warmup_steps: int, num_steps: int, key: str = _KEY) -> Curve:
    """Return the curve of a run of `num_steps` updates. `key`: the schedule's. Raises ConfigError if the schedule does
    not fit into the run."""
    if isinstance(given, tuple):
        return _sequence(given, warmup_steps, num_steps, key)
    schedule = SCHEDULES[given]() if isinstance(given, str) else given.schedule
    schedule.check(key, warmup_steps, num_steps)
    after, before = schedule.factor(warmup_steps, num_steps), warmup(0.0, 1.0, warmup_steps)
    factor = (lambda update: before(update) if update < warmup_steps else after(update)) if warmup_steps else after
    return Curve(factor, tuple(schedule.landmarks(warmup_steps, num_steps)))


def known_keys() -> list[str]:
    """Return the options of all schedules, dotted."""
    return [f"{_KEY}.{key}" for key in option_names(SCHEDULES)]


def _sequence(pieces: Sequence[Piece], warmup_steps: int, num_steps: int, key: str) -> Curve:
    if warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps: {warmup_steps}, and {key} is a list, which has its own warmup; make it the first "
            f"piece, {{name: warmup, steps: {warmup_steps}}}"
        )
    ends = [0]
    for number, piece in enumerate(pieces):
        end = num_steps if piece.place.steps is None else ends[-1] + piece.place.steps
        if not ends[-1] < end <= num_steps:
            raise ConfigError(
                f"{key}.{number}: it begins after {ends[-1]} updates"
                + ("" if piece.place.steps is None else f" and ends after {end}")
                + f", and the run has {num_steps}; make the pieces shorter"
            )
        ends.append(end)
    if ends[-1] < num_steps:
        raise ConfigError(
            f"{key}: the pieces have {ends[-1]} updates in all, and the run has {num_steps}; leave out steps of the "
            "last piece, which then takes the rest"
        )
    begins, factors, landmarks = ends[:-1], [], []
    for number, (piece, (begin, end)) in enumerate(zip(pieces, pairwise(ends), strict=True)):
        piece.schedule.check(f"{key}.{number}", 0, end - begin)
        factors.append(piece.schedule.factor(0, end - begin, piece.place.max_lr_ratio))
        landmarks += [begin + update for update in piece.schedule.landmarks(0, end - begin)]

    def factor(update: int) -> float:
        number = bisect_right(begins, update) - 1
        return factors[number](update - begins[number])

    return Curve(factor, tuple(landmarks))


def _piece(key: str, value: Any) -> Piece:
    keys = value if isinstance(value, dict) else {}
    own = {name: keys[name] for name in Place.model_fields if name in keys}
    rest = {name: one for name, one in keys.items() if name not in own} if isinstance(value, dict) else value
    named, place = _named(key, rest, PIECES, tuple(Place.model_fields)), _validated(key, Place, own)
    low = getattr(named.schedule, "min_lr_ratio", 0.0)
    if low > place.max_lr_ratio:
        raise ConfigError(f"{key}.min_lr_ratio: {low} is more than max_lr_ratio: {place.max_lr_ratio}; give less")
    return Piece(named.name, named.schedule, place)


def _named(key: str, value: Any, known: dict[str, type[Schedule]], more: tuple[str, ...] = ()) -> Named:
    """Check a name, or a section with a name. `more`: keys beside the name and the options, for messages."""
    if isinstance(value, str):
        value = {"name": value}
    names = ", ".join(known)
    if not isinstance(value, dict):
        lists = "" if more else ", or a list of such sections"
        raise ConfigError(f"{key}: {shown(value)}; give a name, or a section with a name and options{lists}: {names}")
    options = dict(value)
    name = options.pop("name", None)
    if name is None:
        raise ConfigError(f"{key}.name: missing; give {names}")
    if name == "warmup" and name not in known:
        raise ConfigError(f"{key}: warmup is a piece of a list; before another schedule give optim.warmup_steps")
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise ConfigError(f"{key}: {shown(name)}: input should be {names}{hint}")
    for option in options:
        if option not in known[name].model_fields:
            raise ConfigError(f"{key}.{option}: {_misplaced(key, option, name, known, more)}")
    return Named(name, _validated(key, known[name], options, name))


def _misplaced(key: str, option: str, name: str, known: dict[str, type[Schedule]], more: tuple[str, ...]) -> str:
    """Describe a key that the schedule `name` does not have."""
    if not more and option in Place.model_fields:
        return f"is for a piece of a list: {_KEY}=[{{name: {name}, {option}: …}}, …]"
    if knowing := [other for other, schedule in known.items() if option in schedule.model_fields]:
        return f"is for {', '.join(knowing)}, and the schedule is {name}; leave it out, or take one of those"
    return f"unknown key{nearest(f'{key}.{option}', ['name', *more, *known[name].model_fields])}"


def _validated(key: str, section: type[Any], values: dict[str, Any], name: str = "") -> Any:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise ConfigError(f"{key}.{first['loc'][0]}: missing, and {name} needs it") from None
        raise ConfigError(f"{key}.{explain(error, section)}") from None


def _parse_of_a_group(value: Any) -> Given:
    try:
        return parse(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(_KEY).lstrip(":. ")) from None


Key: TypeAlias = Annotated[Given, PlainValidator(parse), PlainSerializer(written)]  # the key optim.schedule
OfAGroup: TypeAlias = Annotated[Given, PlainValidator(_parse_of_a_group), PlainSerializer(written)]
