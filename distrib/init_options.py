"""The config's section `init`: weights to begin with."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from distrib.config_section import Section

NEWEST, BEST = "newest", "best"
Globs = Annotated[tuple[str, ...], Field(strict=False)]


class InitConfig(Section):
    """Where the weights of a new run come from, and which of them.

    A name of the source is renamed first. `include` and `exclude` then select names, of the source and of the model.
    """

    source: str = Field(alias="from", min_length=1)  # a run folder, a folder or a file
    checkpoint: str | int = NEWEST  # of a run folder: newest, best or a step
    include: Globs = ()  # none: all
    exclude: Globs = ()
    rename: dict[str, str] = Field(default_factory=dict)  # what a name begins with -> what to put in its place
    strict: bool = True  # false: the model may have names that the source has not, and the other way round

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _which(cls, value: Any) -> Any:
        is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
        if not is_step and value not in (NEWEST, BEST):
            raise ValueError(f"{value!r} is not newest, best or a step")
        return value

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {"from": self.source, **{key: value for key, value in values.items() if key not in ("from", "source")}}

    def renamed(self, name: str) -> str:
        """Return the name that a tensor of the source has in the model. The longest beginning that fits counts."""
        begin = max((begin for begin in self.rename if name.startswith(begin)), key=len, default=None)
        return name if begin is None else self.rename[begin] + name.removeprefix(begin)

    def selects(self, name: str) -> bool:
        """Return whether a tensor is to be loaded, by its name in the model."""
        return (not self.include or fits(name, self.include)) and not fits(name, self.exclude)

    def identity(self) -> dict[str, Any]:
        """Return what decides which tensors are loaded. The source's content is in the run's environment.json."""
        return {"include": list(self.include), "exclude": list(self.exclude), "rename": dict(self.rename)}


def fits(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
