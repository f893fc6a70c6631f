"""`Task`, the class a user writes (data, model, loss, metrics), and `Loss`, which its `loss` method returns."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from distrib.errors import ConfigError
from distrib.targets import build

if TYPE_CHECKING:
    from distrib.config import TaskConfig  # imports pydantic, which a script that only needs the model can do without
    from distrib.samples import Image, Table, Text


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum of losses and the number of items it sums (samples, tokens, …), never a mean.

    The gradient of a step is that of the sum of all `total`s divided by the sum of all `count`s, over all micro-batches
    of all ranks. So it is exact even if micro-batches have different counts.
    `total`: scalar tensor. `count`: number or scalar tensor, 0 or more; a float if items have weights.
    `sums`: more numbers of a training step, by name: `{"accuracy": (right, n)}`, two numbers or scalar tensors each.
    Both are summed over all micro-batches of all ranks; the first divided by the second is `train/accuracy`. The names
    must be the same in each micro-batch. An evaluation does not use them.
    """

    total: Tensor
    count: float | Tensor
    sums: Mapping[str, tuple[float | Tensor, float | Tensor]] | None = None


class Task:
    """Subclass this, and override what your task needs. `train_dataset`, `model` and `loss` have no default.

    distrib seeds the random generators of Python, numpy and torch from the config's seed, the same on every rank,
    before each call of `prepare`, `train_dataset`, `eval_dataset`, `model` and `optimizer`. A distrib command also
    seeds them before it constructs the task. If your own script constructs it, seed them there.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # constructor arguments, for run_folder/environment.py

    def __new__(cls, *args: Any, **kwargs: Any) -> "Task":
        task = super().__new__(cls)
        object.__setattr__(task, "_given", (args, kwargs))  # a frozen dataclass refuses a plain assignment
        return task

    # Without this, inspect.signature would show *args and **kwargs for a subclass that has no __init__.
    __new__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)]
    )

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        """Make the files that the datasets read: download, unpack, tokenise. Does nothing by default.

        Every command that reads data calls this before `train_dataset()` and `eval_dataset()`, in one process of each
        machine. Rank 0 runs it first, then local rank 0 of all other machines at the same time; the other ranks wait.
        Return at once if the files exist. Then the work is done once per machine on local disks, and once in all on a
        shared file system. Set nothing on `self`, because most ranks never run this method.
        """

    def train_dataset(self) -> Dataset[Any]:
        """Return the samples to train on: a dataset with `__len__`, such as a `distrib.data.Mixture`, or an
        IterableDataset that each rank reads a different part of."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataset()")

    def sample_weights(self) -> Sequence[float] | Tensor | None:
        """Return a weight for each sample of `train_dataset()`, which was called before. By default None: each sample
        is read once an epoch.

        With weights, samples are drawn with replacement, each with a probability proportional to its weight. An epoch
        has as many draws as there are samples.
        """
        return None

    def eval_dataset(self) -> Dataset[Any] | None:
        """Return the samples to evaluate on, or None for no evaluation."""
        return None

    def eval_datasets(self) -> dict[str, Dataset[Any]]:
        """Return several evaluation sets by name; the metrics of each are `eval/NAME/…`. By default, the one of
        `eval_dataset`, whose metrics are `eval/…`."""
        dataset = self.eval_dataset()
        return {} if dataset is None else {"": dataset}

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples: those of one micro-batch, or of a batch of an evaluation. By default torch's
        default_collate.

        Runs in the worker processes, if there are some. The batch may hold tensors, strings and other objects, nested
        in lists, tuples and dicts; what has a `.to(device)` is moved to the device.
        """
        return default_collate(samples)

    def model(self) -> nn.Module:
        """Return the module to train, with its initial weights. torch's generators have the config's seed."""
        raise NotImplementedError(f"{type(self).__name__} has no model()")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the forward pass of one micro-batch. By default `model(batch[0])`."""
        return model(batch[0])

    def loss(self, output: Any, batch: Any) -> Loss:
        """Return the sum of the losses of one micro-batch, and how many items it sums."""
        raise NotImplementedError(f"{type(self).__name__} has no loss()")

    def predict(self, output: Any, batch: Any) -> dict[str, Tensor]:
        """Return rows for `metrics`: tensors (or lists) whose first dimension has one entry for each sample."""
        return {}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Compute metrics over the rows of a whole evaluation set, in dataset order. Called on rank 0 only.

        A second argument, `metrics(self, rows, name)`, gets the name of the set.
        """
        return {}

    def samples(self, rows: dict[str, Tensor]) -> "Mapping[str, Image | Text | Table]":
        """Return what people are to look at after an evaluation, by name: images, texts, tables. Called on rank 0 only,
        with the rows that `metrics` gets, and with the name of the set if it takes a second argument."""
        return {}

    def optimizer(self, params: list[tuple[str, nn.Parameter]]) -> Optimizer | None:
        """Return your own optimizer, for example with parameter groups, or None to use the config's.

        `params`: (name, parameter) pairs, which torch's optimizers accept. The config's schedule multiplies the
        learning rate of each group. This method is called more than once, also with parameters on torch's meta device.
        """
        return None

    def learning_rate(self, update: int, num_updates: int) -> float:
        """Return the learning rate of an update. By default `optim.schedule` decides, and nothing calls this method.

        `update`: how many updates the run has made before it. `num_updates`: how many the run makes, if it skips none.
        Return the same number for the same arguments, on every rank. It replaces `optim.lr` and the schedule. If the
        optimizer has groups of different rates, it is the rate of the first one, and the others keep their ratio to it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no learning_rate()")

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether the config's `optim.weight_decay` applies to this parameter. By default it applies to all.

        `parameter` may be on torch's meta device. If distrib only estimates memory, it is a flat shard.
        """
        return True

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write trained weights into an empty folder, for `distrib export`. By default: `model.safetensors`.

        `weights`: named as in the model's state_dict. Two names of a tied parameter map to the same tensor.
        """
        first_name: dict[int, str] = {}
        for name, tensor in weights.items():
            first_name.setdefault(id(tensor), name)
        # save_file refuses tensors that share memory
        untied = {name: t if first_name[id(t)] == name else t.clone() for name, t in weights.items()}
        save_file(untied, folder / "model.safetensors")

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the model's repeated modules, such as transformer layers. fsdp2 shards, activation checkpointing
        recomputes and `train.compile: blocks` compiles each of them as a unit.

        By default these are the children of ModuleLists, ModuleDicts and Sequentials that have parameters and
        submodules and share their class with a sibling. If such modules are nested, only the outermost count.
        """
        return _repeated(model)


def own_method(task: Task, name: str) -> Callable[..., Any] | None:
    """Return the method of that name which the task has in place of Task's; None if it has none.

    Many tasks have fields such as `samples`, `blocks` or `learning_rate`, a dataclass's for example. A field is no
    method, unless it is callable, and it hides none of the task's class.
    """
    found = getattr(task, name, None)
    if not callable(found):
        in_class: Any = inspect.getattr_static(type(task), name)
        is_method = inspect.isfunction(in_class) or isinstance(in_class, staticmethod | classmethod)
        found = in_class.__get__(task, type(task)) if is_method else None
    is_inherited = getattr(found, "__func__", None) is getattr(Task, name)
    return None if is_inherited else found


def method_of(task: Task, name: str) -> Callable[..., Any]:
    """Return the task's own method, or else Task's."""
    inherited: Callable[..., Any] = getattr(Task, name).__get__(task)
    return own_method(task, name) or inherited


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
    """Import the class that `task.target` names, and construct it with the config's arguments. Raises ConfigError."""
    if config is None:
        raise ConfigError('task: missing; name yours as task: {target: "my_file:MyTask"}')
    task: Task = build(config.target, config.arguments, "task", Task)
    return task
