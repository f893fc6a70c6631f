"""What the user writes: one YAML file, strict and typed. Every error names its key.

Precedence: defaults < file < `key=value`. An unknown key is refused with the nearest valid one.
"""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrib import config_yaml
from distrib.config_yaml import one_line, shown
from distrib.errors import ConfigError

MixedPrecision: TypeAlias = Literal["no", "bf16", "fp16"]
StrategyName: TypeAlias = Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
Offload: TypeAlias = Literal["none", "optimizer", "all"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]
Compile: TypeAlias = Literal[False, "blocks", "model"]
_LONGEST_NAME = 200  # of a run
_EXACT = 2**53  # up to here every reader of JSON has whole numbers exactly
NonNegativeInt = Annotated[int, Field(ge=0, le=_EXACT)]
PositiveInt = Annotated[int, Field(gt=0, le=_EXACT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]  # within fp32
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


class TaskConfig(_Section):
    """`target` is `module:Class`; every other key is a keyword argument of that class."""

    model_config = ConfigDict(extra="allow")

    target: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataConfig(_Section):
    """A step reads `global_batch_size` samples, in micro-batches of `micro_batch_size`."""

    global_batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 16
    num_workers: Annotated[int, Field(ge=0, le=4096)] = 0
    prefetch_factor: Annotated[int, Field(gt=0, le=65536)] = 2  # micro-batches each worker reads ahead


class OptimConfig(_Section):
    """`name` is a torch.optim class; the keys that class does not take may not be given."""

    name: str = "adamw"
    lr: NonNegativeFloat = 0.001
    weight_decay: NonNegativeFloat = 0.0
    betas: Annotated[tuple[Rate, Rate], Field(strict=False)] = (0.9, 0.999)
    momentum: NonNegativeFloat = 0.0
    options: dict[str, Any] = {}  # further keyword arguments of the class
    schedule: Schedule = "constant"
    warmup_steps: NonNegativeInt = 0


class TrainConfig(_Section):
    """Length of the run: `epochs` or `steps`, one of the two."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    mixed_precision: MixedPrecision = "no"
    max_grad_norm: PositiveFloat | None = None  # none: no clipping
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: PositiveInt = 100  # steps in a row, after which the run fails
    determinism: Literal["fast", "bitwise"] = "fast"  # bitwise: the same bits from any number of processes
    compile: Compile = False  # by torch.compile: each of the task's blocks, or the model's whole forward

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            given = "neither" if self.epochs is None else f"epochs: {self.epochs} and steps: {self.steps}"
            raise ValueError(f"give the length of the run as epochs or as steps, one of the two; given: {given}")
        return self


class StrategyConfig(_Section):
    """Where parameters, gradients and optimizer state lie. Changes memory and speed, not what is computed.

    `auto` takes what the launcher says, else ddp (single where there is one process).
    """

    name: StrategyName = "auto"
    offload: Offload = "none"  # what lies in CPU memory: nothing, the optimizer state, or the parameters too
    activation_checkpointing: bool = False  # of the task's blocks: compute again what the backward needs
    communication_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients travel; bf16 rounds them
    timeout: Annotated[int, Field(gt=0, le=10**8)] = 1800  # seconds that ranks wait for one another in a collective
    find_unused_parameters: bool = False  # ddp
    static_graph: bool = False  # ddp
    reshard_after_forward: bool = True  # fsdp2
    deepspeed: dict[str, Any] | str = {}  # zero0 to zero3: further options of DeepSpeed's, or a JSON file with them


class EvalConfig(_Section):
    """Evaluation happens at the end, and every `every_steps` steps where that is not 0."""

    every_steps: NonNegativeInt = 0


class CheckpointConfig(_Section):
    every_steps: NonNegativeInt = 1000  # 0: at the end only
    keep: PositiveInt = 3  # the newest
    keep_every: NonNegativeInt = 0  # and those at its multiples, for ever; 0: none


class TrackingConfig(_Section):
    """What is told to wandb, and to the other trackers that accelerate knows."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online where credentials are configured
    project: str | None = None  # none: wandb's own setting, else distrib
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    name: str | None = None  # none: wandb's own setting, else the config's
    notes: str | None = None
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    checkpoints: bool = False  # as artifacts, by reference
    others: Annotated[tuple[str, ...], Field(strict=False)] = ()  # by accelerate's names: tensorboard, mlflow, …


class ObserverConfig(TaskConfig):
    """`target` is `module:Class`, a distrib.Observer; every other key is a keyword argument of that class."""


class Config(_Section):
    """A whole run. docs/config.md explains each key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=_LONGEST_NAME)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskConfig | None = None  # none: the task is given to Trainer in Python
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    strategy: StrategyConfig = StrategyConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    observers: Annotated[tuple[ObserverConfig, ...], Field(strict=False)] = ()  # they look on

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Config":
        """Read a YAML file and apply `key=value` overrides. Raises ConfigError."""
        path = Path(path)
        return cls.parse(config_yaml.read(path), path, overrides)

    @classmethod
    def parse(cls, text: str, path: Path, overrides: Sequence[str] = ()) -> "Config":
        """The config in a YAML text, which stands in the file at `path`. Raises ConfigError."""
        values = config_yaml.parse(text, str(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a config is a mapping of sections, this is a {type(values).__name__}")
        for override in overrides:
            _apply(values, override)
        if "name" not in values:
            values["name"] = _name_from(path)
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> "Config":
        """Validate a dictionary. Raises ConfigError, one line, naming the key."""
        try:
            return cls.model_validate(config_yaml.plain(values))
        except ValidationError as error:
            raise ConfigError(one_line(f"{source}: {_explain(error)}")) from None
        except ConfigError as error:
            raise ConfigError(one_line(f"{source}: {error}")) from None

    def dump(self) -> str:
        """As YAML, every default written out; `Config.load` reads it back to an equal Config."""
        return config_yaml.dump(self.model_dump(mode="json"))

    def identity(self) -> dict[str, Any]:
        """The keys that decide what is computed, flat: those left out change only how fast it gets there."""
        values = self.model_dump(mode="json", include={"seed", "task", "data", "optim", "train"})
        for key in ("num_workers", "prefetch_factor"):
            del values["data"][key]
        for key in ("compile", "max_skipped"):
            del values["train"][key]
        values["strategy"] = {"communication_dtype": self.strategy.communication_dtype}
        return flatten(values)

    def flat(self) -> dict[str, Any]:
        """Every key, with its sections before it, and its value."""
        return flatten(self.model_dump(mode="json"))


def _name_from(path: Path) -> str:
    """The file's name, without accents and with `-` for what a run's name cannot hold. Raises ConfigError."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", path.stem) if not unicodedata.combining(char))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:_LONGEST_NAME]
    if not name or any(char.isalnum() and not char.isascii() for char in plain):
        raise ConfigError(
            f"{one_line(str(path))}: the run cannot be named after the file; give it a name of letters a to z, digits, "
            "'.', '_' and '-': name=my-run"
        )
    return name


_EITHER_OR = {"train.steps": "epochs", "train.epochs": "steps"}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown(override)}: an override is written key=value, for example optim.lr=0.01")
    if key in _EITHER_OR:  # one choice: the override takes the place of what the file says
        section = values.get("train")
        if isinstance(section, dict):
            section.pop(_EITHER_OR[key], None)
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{shown(override)}: {section} is a value, not a section, so {key} cannot be set in it"
                + _did_you_mean((section,), inner)
            )
        values = inner
    values[last] = config_yaml.parse(text, override)


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's errors: key, value, what is allowed."""
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(first['loc'])}{more}"
    if key == "train" and first["type"] == "missing":
        return "train: missing; give the length of the run, train.epochs or train.steps"
    if first["type"] == "model_type":
        given = first["input"]
        return f"{key}: {shown(given)} is a value, and {key} is a section{_did_you_mean(first['loc'], given)}{more}"
    if first["type"] == "missing":
        return f"{key}: missing, and has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if first["type"] == "value_error" else f"{shown(first['input'])}: "
    return f"{key}: {given}{message}{more}"


def _did_you_mean(location: tuple[int | str, ...], value: object) -> str:
    """The key of a section that somebody means who gives the section a value, for example strategy=ddp."""
    section = Config.model_fields[str(location[0])].annotation if location[0] in Config.model_fields else None
    fields = getattr(section, "model_fields", TaskConfig.model_fields if location[0] == "task" else {})
    meant = [key for key in ("name", "target", "epochs", "steps", "every_steps", "wandb") if key in fields]
    return f", did you mean {' or '.join(f'{location[0]}.{key}={value}' for key in meant)}?" if meant else ""


def _nearest(location: tuple[int | str, ...]) -> str:
    """`, did you mean data.num_workers?` or the keys that are allowed there."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        section = annotation
    prefix = "".join(f"{part}." for part in location[:-1])
    everywhere = {
        f"{name}.{inner}": inner
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for inner in field.annotation.model_fields
    }
    wrong = str(location[-1])
    if close := difflib.get_close_matches(wrong, section.model_fields, n=1):
        return f", did you mean {prefix}{close[0]}?"
    if elsewhere := [key for key, inner in everywhere.items() if inner == wrong]:
        return f", did you mean {elsewhere[0]}?"
    return f"; allowed here: {', '.join(section.model_fields)}"


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
