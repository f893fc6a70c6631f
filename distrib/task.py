"""What the user brings: data, model, loss, metrics."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from distrib.errors import ConfigError
from distrib.targets import build

if TYPE_CHECKING:
    from distrib.config import TaskConfig  # pydantic takes its time and memory, which a model alone has no use for


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum and the number of items it sums over (samples, tokens, …), never a mean.

    The gradient of a step is that of `total / count` over all micro-batches of all ranks, which is exact also where
    they count differently many items. `total`: scalar tensor; `count`: a number or a scalar tensor, 0 or more (a
    float where items have weights).
    """

    total: Tensor
    count: float | Tensor


class Task:
    """Subclass, and override what your task needs. The first four have no default.

    Python's, numpy's and torch's generators are seeded from the config before each of `prepare`, `train_dataset`,
    `eval_dataset`, `model` and `optimizer`, on every rank alike, and before the class is called by a command. In a
    script of your own you call it, and seed what it draws.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # the arguments of the class, see state/identity.py

    def __new__(cls, *args: Any, **kwargs: Any) -> "Task":
        task = super().__new__(cls)
        object.__setattr__(task, "_given", (args, kwargs))  # a frozen dataclass refuses a plain assignment
        return task

    # Or inspect.signature would show the arguments above for a class without an __init__ of its own.
    __new__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)]
    )

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        """Make the files that the datasets read: download, unpack, tokenise. Nothing by default.

        Called in every command that reads data, before `train_dataset()` and `eval_dataset()`, in one process of each
        machine: rank 0 first, and when it is done, local rank 0 of all other machines at once. The other ranks wait. So
        return at once if the files are there: then it works once a machine on local disks, and once on a shared file
        system. Keep nothing on `self`, because most ranks never run it.
        """

    def train_dataset(self) -> Dataset[Any]:
        """The samples to train on: with `__len__`, or an IterableDataset that gives each rank its own."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataset()")

    def eval_dataset(self) -> Dataset[Any] | None:
        """The samples to evaluate on, or None for no evaluation."""
        return None

    def model(self) -> nn.Module:
        """The module to train, freshly initialised. torch's generators are seeded from the config before."""
        raise NotImplementedError(f"{type(self).__name__} has no model()")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Forward pass of one micro-batch."""
        return model(batch[0])

    def loss(self, output: Any, batch: Any) -> Loss:
        """Sum and count of one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} has no loss()")

    def predict(self, output: Any, batch: Any) -> dict[str, Tensor]:
        """Rows for `metrics`: each tensor has one entry a sample in its first dimension."""
        return {}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """On rank 0: metrics over the whole evaluation set, its rows in dataset order."""
        return {}

    def optimizer(self, params: list[tuple[str, nn.Parameter]]) -> Optimizer | None:
        """An optimizer of your own, for example with rates by group; None takes the config's.

        `params` are (name, parameter) pairs, which torch's optimizers take as they are. The config's schedule
        scales the rate of each group. Called more than once, also with parameters on torch's meta device.
        """
        return None

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the config's `optim.weight_decay` is for this parameter; by default it is for each.

        `parameter` may be on torch's meta device, and is a flat shard of it where only memory is counted.
        """
        return True

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write trained weights into an empty folder, in the form that their readers know: what `distrib export` does.

        `weights` are named as in the model's state_dict; a parameter with two names is one tensor under both. By
        default they become `model.safetensors`, for plain torch.
        """
        written: dict[int, str] = {}
        for name, tensor in weights.items():
            written.setdefault(id(tensor), name)
        apart = {name: tensor if written[id(tensor)] == name else tensor.clone() for name, tensor in weights.items()}
        save_file(apart, folder / "model.safetensors")

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated parts of the model, which fsdp2 gathers and activation checkpointing recomputes one by one.

        By default those children of its ModuleLists, ModuleDicts and Sequentials that are made of modules themselves,
        have parameters and share their class with a sibling; the outermost, where they lie in one another.
        """
        return _repeated(model)


def _repeated(module: nn.Module) -> list[nn.Module]:
    children = [child for child in module.children() if _has(child.children()) and _has(child.parameters())]
    blocks: list[nn.Module] = []
    for child in children:
        of_its_class = sum(type(other) is type(child) for other in children)
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and of_its_class > 1:
            blocks.append(child)
        else:
            blocks.extend(_repeated(child))
    return blocks


def _has(items: Iterator[object]) -> bool:
    return next(items, None) is not None


def load_task(config: "TaskConfig | None") -> Task:
    """Import `target` and build it with the config's arguments. Raises ConfigError."""
    if config is None:
        raise ConfigError('task: missing; name yours as task: {target: "my_file:MyTask"}')
    task: Task = build(config.target, config.arguments, "task", Task)
    return task
