"""Validates the JSON of a run folder: the keys that distrib reads, with their types. Other keys are allowed."""

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

_FORM = ConfigDict(extra="allow", strict=True)
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, lt=1e9)]
Number = float | None  # null: not finite
_REQUIRED_KEYS = {  # event -> keys it must have
    "started": ("world_size", "strategy", "launcher"),
    "resumed": ("step", "passed_over"),
    "warning": ("reason",),
    "skipped": ("step", "verdict"),
    "compiling": ("what",),
    "initialized": ("lines",),
    "checkpoint": ("step",),
    "unfrozen": ("step", "patterns"),
    "preempted": ("step",),
    "stopped": ("step", "reason"),
    "failed": ("error",),
}


class Step(TypedDict):
    """A line of steps.jsonl."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    step: Count
    epoch: Count
    loss: Number
    lr: float
    grad_norm: Number
    count: Number
    verdict: str
    samples: str
    seconds: Seconds
    data_seconds: NotRequired[Seconds]
    optimizer_seconds: NotRequired[Seconds]
    communication_seconds: NotRequired[Seconds]
    peak_memory: NotRequired[Count]
    loss_scale: NotRequired[Number]


class Evaluation(TypedDict):
    """A line of evals.jsonl."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    step: Count
    count: Count
    metrics: dict[str, Number]
    seconds: NotRequired[Seconds]
    samples: NotRequired[list[str]]  # paths in the run folder


class Event(TypedDict):
    """A line of events.jsonl."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    event: str
    time: NotRequired[str]
    step: NotRequired[Count]
    reason: NotRequired[str]
    error: NotRequired[str]
    verdict: NotRequired[str]
    model: NotRequired[str]
    what: NotRequired[str]
    passed_over: NotRequired[list[str]]
    lines: NotRequired[list[str]]
    requeue: NotRequired[bool]
    seconds: NotRequired[Seconds]
    stall: NotRequired[Seconds]


class Origin(TypedDict):
    """`forked_from` of environment.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    path: str
    step: Count
    chain: str
    reset_optimizer: NotRequired[bool]


class Lost(TypedDict):
    """An entry of environment.json's `lost_steps`: the ledger lines of steps `first` to `next - 1` are lost."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    first: Count
    next: Count
    chain: str  # before step `next`


class Start(TypedDict):
    """An entry of environment.json's `starts`."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    versions: NotRequired[dict[str, Any]]
    machine: NotRequired[dict[str, Any]]
    code: NotRequired[dict[str, str | None]]
    directory: NotRequired[str]
    flops_per_step: NotRequired[float]
    peak_flops: NotRequired[float]


Figures = Annotated[list[float], Field(min_length=1)]


class Print(TypedDict):
    """The print of one sample."""

    exact: str
    float: Figures
    coarse: Figures


class Data(TypedDict):
    """An entry of environment.json's `data`: a dataset's fingerprint."""

    length: Count
    samples: dict[str, Print | str]
    order: NotRequired[dict[str, Any]]  # that of the training set, if it is no permutation


class TaskOf(TypedDict):
    """`task` of environment.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    file: str | None
    arguments: dict[str, Any]
    parameters: dict[str, list[Count]]


class InitOf(TypedDict):
    """`init` of environment.json: what the run's weights were loaded from."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    path: str
    sha256: str
    step: Count | None


class Environment(TypedDict):
    """environment.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    training_samples: Annotated[int, Field(ge=1, lt=2**63)] | None
    starts: Annotated[list[Start], Field(min_length=1)]
    versions: NotRequired[dict[str, Any]]
    machine: NotRequired[dict[str, Any]]
    git_commit: NotRequired[str | None]
    data: NotRequired[dict[str, Data | None]]
    task: NotRequired[TaskOf]
    init: NotRequired[InitOf]
    forked_from: NotRequired[Origin | None]
    lost_steps: NotRequired[list[Lost]]
    moved: NotRequired[list[str]]  # config keys that --moved has named


class Best(TypedDict):
    """`best` of summary.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    metric: str
    mode: str
    value: float
    step: Count


class Summary(TypedDict):
    """summary.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    steps: Count
    metrics: dict[str, Number]
    world_size: Count
    wall_seconds: float
    best: NotRequired[Best]
    stopped: NotRequired[str]


class FileOf(TypedDict):
    """An entry of a manifest's `files`."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    bytes: Count
    sha256: str


class Stretches(TypedDict):
    """An entry of a manifest's `tensors`."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    dtype: str
    shape: list[Count]
    stretches: list[Annotated[tuple[str, Count, Count], Field(strict=False)]]


class FrozenOf(TypedDict):
    """`frozen` of a manifest: the parameters that the checkpoint leaves out, and one digest of their values."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    names: list[str]
    sha256: str


class Manifest(TypedDict):
    """manifest.json."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    step: Count
    chain: str
    applied: Count
    files: dict[str, FileOf]
    tensors: dict[str, Stretches]
    tied: dict[str, str]
    frozen: NotRequired[FrozenOf]
    run: NotRequired[dict[str, str]]


def _require_keys(event: dict[str, Any]) -> dict[str, Any]:
    for key in _REQUIRED_KEYS.get(event["event"], ()):
        if key not in event:
            raise ValueError(f"{event['event']} has no {key}")
    return event


def _form(of: Any) -> TypeAdapter[dict[str, Any]]:
    """Return a validator typed as a plain dictionary, because entries may have other keys too."""
    return TypeAdapter(of)


STEP = _form(Step)
EVALUATION = _form(Evaluation)
EVENT = _form(Annotated[Event, AfterValidator(_require_keys)])
ENVIRONMENT = _form(Environment)
SUMMARY = _form(Summary)
MANIFEST = _form(Manifest)
