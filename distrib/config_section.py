"""What the sections of the config have in common, and one line for what is wrong in one."""

from collections.abc import Callable, Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distrib.config_yaml import shown
from distrib.errors import did_you_mean

_EXACT = 2**53  # largest integer that every JSON reader represents exactly
NonNegativeInt = Annotated[int, Field(ge=0, le=_EXACT)]
PositiveInt = Annotated[int, Field(gt=0, le=_EXACT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]  # within fp32
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
_MOST_MEANT = ("name", "target", "from", "epochs", "steps", "decay", "every_steps", "wandb")


class Section(BaseModel):
    """Strict: no unknown key, no conversion of types. Frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


def explain(error: ValidationError, root: type[BaseModel], more_keys: Callable[[], Iterable[str]] = tuple) -> str:
    """One line for the first of pydantic's errors: key, value, what is allowed.

    `root`: the whole config. `more_keys`: dotted keys that an unknown one may mean, beside those of `root`.
    """
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(first['loc'], root, more_keys)}{more}"
    if key == "train" and first["type"] == "missing":
        return "train: missing; give the length of the run, train.epochs or train.steps"
    if first["type"] == "model_type":
        given = first["input"]
        return f"{key}: {shown(given)} is a value, and {key} is a section{meant_key(first['loc'], given, root)}{more}"
    if first["type"] == "missing":
        return f"{key}: missing, and has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if first["type"] == "value_error" else f"{shown(first['input'])}: "
    return f"{key}: {given}{message}{more}"


def meant_key(location: tuple[int | str, ...], value: object, root: type[BaseModel]) -> str:
    """The key of a section that somebody means who gives the section a value, for example strategy=ddp."""
    section: type[BaseModel] | None = root
    for part in location:
        section = None if section is None else _section(section, str(part))
    meant = [key for key in _MOST_MEANT if section is not None and key in keys_of(section)]
    dotted = ".".join(str(part) for part in location)
    return f", did you mean {' or '.join(f'{dotted}.{key}={value}' for key in meant)}?" if meant else ""


def nearest(key: str, allowed: Iterable[str], elsewhere: Callable[[], Iterable[str]] = tuple) -> str:
    """`, did you mean data.num_workers?` or the keys that are allowed there.

    `key` and `elsewhere`: dotted. `allowed`: what the section of `key` knows. `elsewhere`: keys of other sections.
    """
    prefix, dot, wrong = key.rpartition(".")
    allowed = list(allowed)
    if hint := did_you_mean(wrong, allowed, shown=lambda close: f"{prefix}{dot}{close}"):
        return hint
    if same := [other for other in elsewhere() if other.rpartition(".")[2] == wrong]:
        return f", did you mean {same[0]}?"
    return f"; allowed here: {', '.join(allowed)}"


def _nearest(location: tuple[int | str, ...], root: type[BaseModel], more_keys: Callable[[], Iterable[str]]) -> str:
    section = root
    for part in location[:-1]:
        inner = _section(section, str(part))
        if inner is None:
            return ""
        section = inner
    dotted = ".".join(str(part) for part in location)
    return nearest(dotted, keys_of(section), lambda: [*_keys(root), *more_keys()])


def _section(parent: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of a section of `parent`, also where it may be left out (`| None`)."""
    field = parent.model_fields.get(key)
    kinds = () if field is None else (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _keys(root: type[BaseModel]) -> list[str]:
    """Those of all sections, dotted."""
    sections = {name: _section(root, name) for name in root.model_fields}
    return [f"{name}.{key}" for name, section in sections.items() if section is not None for key in keys_of(section)]


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys of a section, as a config writes them."""
    return [field.alias or name for name, field in section.model_fields.items()]
