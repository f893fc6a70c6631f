"""The config: one YAML file, strictly typed. Every error names its key.

Precedence: defaults < bases < file < `key=value`. An error about an unknown key suggests the nearest valid one.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, model_serializer, model_validator

from distrib import alert_options, config_bases, config_yaml, decision_options, schedule_options, strategy_options
from distrib.config_section import NonNegativeFloat as NonNegativeFloat
from distrib.config_section import NonNegativeInt as NonNegativeInt
from distrib.config_section import PositiveFloat as PositiveFloat
from distrib.config_section import PositiveInt as PositiveInt
from distrib.config_section import Section, explain
from distrib.config_yaml import one_line
from distrib.errors import ConfigError
from distrib.init_options import InitConfig
from distrib.optim_groups import GroupConfig
from distrib.optim_groups import Rate as Rate

MixedPrecision: TypeAlias = Literal["no", "bf16", "fp16"]
Compile: TypeAlias = Literal[False, "blocks", "model"]
_LONGEST_NAME = 200  # characters


class TaskConfig(Section):
    """`target` is `module:Class`; every other key is a keyword argument of that class."""

    model_config = ConfigDict(extra="allow")

    target: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataConfig(Section):
    """A step reads `global_batch_size` samples, in micro-batches of `micro_batch_size`."""

    global_batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 16
    num_workers: Annotated[int, Field(ge=0, le=4096)] = 0
    prefetch_factor: Annotated[int, Field(gt=0, le=65536)] = 2  # micro-batches each worker reads ahead
    limit: PositiveInt | None = None  # train on so many of the samples; none: on all


class OptimConfig(Section):
    """`name` is a torch.optim class. A key that the class does not accept is refused."""

    name: str = "adamw"
    lr: NonNegativeFloat = 0.001
    weight_decay: NonNegativeFloat = 0.0
    betas: Annotated[tuple[Rate, Rate], Field(strict=False)] = (0.9, 0.999)
    momentum: NonNegativeFloat = 0.0
    options: dict[str, Any] = Field(default_factory=dict)  # further keyword arguments of the class
    schedule: schedule_options.Key = "constant"
    warmup_steps: NonNegativeInt = 0
    plateau: decision_options.PlateauConfig | None = None  # a further factor of the rate
    groups: Annotated[tuple[GroupConfig, ...], Field(strict=False)] = ()  # parameters with other values; the first fits

    def curve(self, num_steps: int) -> schedule_options.Curve:
        """The factor of the rate, update by update. Raises ConfigError if the schedule does not fit into the run."""
        return schedule_options.curve(self.schedule, self.warmup_steps, num_steps)


class EmaConfig(Section):
    """An exponential moving average of the weights, see training/ema.py."""

    decay: Rate = 0.999
    every_steps: PositiveInt = 1  # averaged at each so many-th update
    start_step: NonNegativeInt = 0  # updates until which the average is the weights themselves


class TrainConfig(Section):
    """Exactly one of `epochs` and `steps` sets the length of the run."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    mixed_precision: MixedPrecision = "no"
    max_grad_norm: PositiveFloat | None = None  # none: no clipping
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: PositiveInt = 100  # the run fails after so many skipped steps in a row
    stop: decision_options.StopConfig | None = None  # none: the run has its whole length
    ema: EmaConfig | None = None
    determinism: Literal["fast", "bitwise"] = "fast"  # bitwise: same bits for any number of processes
    compile: Compile = False  # torch.compile each of the task's blocks, or the whole model

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            given = "neither" if self.epochs is None else f"epochs: {self.epochs} and steps: {self.steps}"
            raise ValueError(f"give the length of the run as epochs or as steps, one of the two; given: {given}")
        return self


_ONCE_IN_ALL: dict[str, Any] = {
    "offload": "none",
    "find_unused_parameters": False,
    "static_graph": False,
    "reshard_after_forward": True,
    "deepspeed": {},
}


class StrategyConfig(Section):
    """Where parameters, gradients and optimizer state lie. Changes memory and speed, not what is computed.

    `auto` takes what the launcher says, else ddp (single where there is one process). `name` may also be that of an
    installed package's strategy, or `module:Class`. Further keys are options of the strategy (`Strategy.Options`).
    """

    model_config = ConfigDict(extra="allow")

    name: str = "auto"
    activation_checkpointing: bool = False  # of the task's blocks: compute again what the backward needs
    communication_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients travel; bf16 rounds them
    timeout: Annotated[int, Field(gt=0, le=10**8)] = 1800  # seconds that ranks wait for one another in a collective

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, values: Any) -> Any:
        """Drop what a run folder of before November 28, 2026 has: every option of every strategy, at its default."""
        if not isinstance(values, dict) or not _ONCE_IN_ALL.keys() <= values.keys():
            return values
        return {key: value for key, value in values.items() if key not in _ONCE_IN_ALL or value != _ONCE_IN_ALL[key]}

    def options(self) -> Section:
        """The options of the strategy `name`; none for auto. Raises ConfigError if there is no such strategy, or if a
        key does not fit."""
        return strategy_options.options(self.name, self.model_extra or {}, StrategyConfig.model_fields)


class EvalSetConfig(Section):
    every_steps: NonNegativeInt  # 0: at the end of the run only


class EvalConfig(Section):
    """Evaluation runs every `every_steps` steps (0: never) and at the end of the run."""

    every_steps: NonNegativeInt = 0
    at_start: bool = False  # also before the first step
    weights: Literal["both", "model", "ema"] = "both"  # with train.ema: the weights, their average, or both
    limit: PositiveInt | None = None  # evaluate on so many samples of each set; none: on all
    sets: dict[str, EvalSetConfig] = Field(default_factory=dict)  # those of Task.eval_datasets that have another rhythm


class CheckpointConfig(Section):
    every_steps: NonNegativeInt = 1000  # 0: at the end only
    keep: PositiveInt = 3  # how many of the newest are kept
    keep_every: NonNegativeInt = 0  # checkpoints at multiples of this step are never deleted; 0: none
    best: decision_options.BestConfig | None = None


class TrackingConfig(Section):
    """Logging to wandb, and to other trackers that accelerate supports."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online if credentials are configured
    project: str | None = None  # none: wandb's own setting, else distrib
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    name: str | None = None  # none: wandb's own setting, else the config's
    notes: str | None = None
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    checkpoints: bool = False  # log checkpoints as artifacts that reference the run folder
    others: Annotated[tuple[str, ...], Field(strict=False)] = ()  # accelerate's names: tensorboard, mlflow, …


class ObserverConfig(TaskConfig):
    """`target` is `module:Class`, a distrib.Observer; every other key is a keyword argument of that class."""


class Config(Section):
    """The config of a run. docs/config.md explains each key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=_LONGEST_NAME)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskConfig | None = None  # none: a script passes the task to Trainer
    init: InitConfig | None = None  # none: the weights that the task's model has
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    strategy: StrategyConfig = StrategyConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    observers: Annotated[tuple[ObserverConfig, ...], Field(strict=False)] = ()
    alerts: alert_options.AlertsConfig | None = None
    _serialize = model_serializer(mode="wrap")(alert_options.leave_out_none)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Config":
        """Read a YAML file and its bases, and apply `key=value` overrides. Raises ConfigError."""
        return cls.load_with_sources(path, overrides)[0]

    @classmethod
    def load_with_sources(
        cls, path: str | Path, overrides: Sequence[str] = ()
    ) -> tuple["Config", list[tuple[str, Any, str]]]:
        """Load as `load` does. Return also key, value and source of what bases and overrides, if any, and file set."""
        path = Path(path)
        sources = config_bases.read(path, overrides)
        values = sources.merge(cls)
        rows = [] if sources.is_one_file() else sources.rows(values)
        config = cls._checked(values, path, sources)
        try:
            strategy_options.require_known(config.strategy.name)
            if config.strategy.model_extra:  # this imports torch
                config.strategy.options()
            if config.train.steps is not None:  # otherwise the data decide the length
                config.optim.curve(config.train.steps)
        except ConfigError as error:
            raise _located(str(error), sources.where) from None
        return config, rows

    @classmethod
    def parse(cls, text: str, path: Path, overrides: Sequence[str] = ()) -> "Config":
        """Parse the YAML text of the file at `path`, which has no bases, and apply overrides. Raises ConfigError."""
        sources = config_bases.Sources([config_bases.Layer(path, config_bases.mapping(text, path))], overrides)
        return cls._checked(sources.merge(cls), path, sources)

    @classmethod
    def _checked(cls, values: dict[str, Any], path: Path, sources: config_bases.Sources) -> "Config":
        if "name" not in values:
            values["name"] = _name_from(path)
        return cls._validate(values, sources.where)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> "Config":
        """Validate a dictionary. Raises ConfigError: one line that names `source` and the key."""
        return cls._validate(values, lambda key: source)

    @classmethod
    def _validate(cls, values: dict[str, Any], where: Callable[[str], str]) -> "Config":
        try:
            return cls.model_validate(config_yaml.plain(values))
        except ValidationError as error:
            raise _located(explain(error, cls, _known_keys), where) from None
        except ConfigError as error:
            raise _located(str(error), where) from None

    def dump(self) -> str:
        """Return the config as YAML, with every default written out. `Config.load` reads back an equal Config."""
        return config_yaml.dump(self.model_dump(mode="json"))

    def identity(self) -> dict[str, Any]:
        """Return, as `{dotted key: value}`, the keys that decide what is computed. The others only affect speed."""
        values = self.model_dump(mode="json", include={"seed", "task", "data", "optim", "train"})
        for key in ("num_workers", "prefetch_factor"):
            del values["data"][key]
        for key in ("compile", "max_skipped"):
            del values["train"][key]
        values["strategy"] = {"communication_dtype": self.strategy.communication_dtype}
        if self.init is not None:
            values["init"] = self.init.identity()
        if self.train.stop is not None or self.optim.plateau is not None:  # then evaluations decide what is computed
            values["eval"] = self.eval.model_dump(mode="json")
        return config_yaml.flatten(values)

    def flat(self) -> dict[str, Any]:
        """Return all keys as `{dotted key: value}`."""
        return config_yaml.flatten(self.model_dump(mode="json"))


def _known_keys() -> list[str]:
    """The options of strategies and schedules, dotted."""
    return [*strategy_options.known_keys(), *schedule_options.known_keys()]


def _name_from(path: Path) -> str:
    """Make a run's name from the file's: without accents, `-` for characters not allowed. Raises ConfigError."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", path.stem) if not unicodedata.combining(char))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:_LONGEST_NAME]
    if not name or any(char.isalnum() and not char.isascii() for char in plain):
        raise ConfigError(
            f"{one_line(str(path))}: the run cannot be named after the file; give it a name of letters a to z, digits, "
            "'.', '_' and '-': name=my-run"
        )
    return name


def _located(problem: str, where: Callable[[str], str]) -> ConfigError:
    """Name the file of the key with which `problem` begins."""
    return ConfigError(one_line(f"{where(problem.partition(':')[0])}: {problem}"))
