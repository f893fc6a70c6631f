"""A task made of an nn.Module, Datasets, a torch loss and torchmetrics metrics that the config names."""

import inspect
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distrib.errors import ConfigError, did_you_mean
from distrib.extras import require
from distrib.targets import build, call, find
from distrib.task import Loss, Task

T = TypeVar("T")

_CLASSIFIERS = (nn.CrossEntropyLoss, nn.NLLLoss)  # their mean is weighted by class, and leaves out ignore_index
_TARGET_HAS_OTHER_SHAPE = (*_CLASSIFIERS, nn.MultiMarginLoss)


class Supervised(Task):
    """Trains a model on batches (input, target): the loss compares its output with the target.

    `model`, `train_dataset`, `eval_dataset`: `{target: "module:Class", …}` with keyword arguments, as for a task. The
    target may also be a function: your own, or one that is annotated to return a model or dataset. `loss`: the name of
    a torch.nn class that takes (output, target), or `{name: CrossEntropyLoss, …}` with arguments. `metrics`: maps a
    name of your choice to a torchmetrics class, by its name or as `{name: R2Score, …}` with arguments. A class in a
    submodule needs its full name, `torchmetrics.classification:MulticlassAccuracy`.
    """

    def __init__(
        self,
        model: dict[str, Any],
        train_dataset: dict[str, Any],
        loss: str | dict[str, Any],
        eval_dataset: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        self._model = _check_spec(model, nn.Module, "task.model")
        self._train_dataset = _check_spec(train_dataset, Dataset, "task.train_dataset")
        self._eval_dataset = None if eval_dataset is None else _check_spec(eval_dataset, Dataset, "task.eval_dataset")
        self._loss = _construct(nn, loss, nn.modules.loss._Loss, "task.loss", reduction="none")
        if len(inspect.signature(type(self._loss).forward).parameters) != 3:
            raise ConfigError(f"task.loss: {type(self._loss).__name__} takes more than (output, target); write a Task")
        self._metrics = _find_metrics(metrics) if metrics else {}

    def train_dataset(self) -> Dataset[Any]:
        return _build_spec(self._train_dataset, Dataset, "task.train_dataset")

    def eval_dataset(self) -> Dataset[Any] | None:
        return None if self._eval_dataset is None else _build_spec(self._eval_dataset, Dataset, "task.eval_dataset")

    def model(self) -> nn.Module:
        return _build_spec(self._model, nn.Module, "task.model")

    def loss(self, output: Tensor, batch: Any) -> Loss:
        """Return a sum and a count whose quotient, for one batch, is the mean that torch computes."""
        target = batch[1]
        if output.shape != target.shape and not isinstance(self._loss, _TARGET_HAS_OTHER_SHAPE):
            raise ConfigError(
                f"task.loss: {type(self._loss).__name__} got an output of shape {tuple(output.shape)} and a target of "
                f"shape {tuple(target.shape)}, which torch would broadcast against each other; make them the same"
            )
        values = self._loss.to(output.device)(output, target)
        return Loss(values.sum(), self._count(values, target))

    def _count(self, values: Tensor, target: Tensor) -> int | Tensor:
        if not isinstance(self._loss, _CLASSIFIERS) or target.is_floating_point():
            return values.numel()
        counted = target[target != self._loss.ignore_index]
        return counted.numel() if self._loss.weight is None else self._loss.weight[counted].sum()

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"output": output.float(), "target": batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        values = {}
        for key, metric in self._metrics.items():
            metric.reset()
            metric.update(rows["output"], rows["target"])
            values[key] = float(metric.compute())
        return values


def _check_spec(spec: Any, kind: type[Any], key: str) -> dict[str, Any]:
    """Check that `spec` has the form `{target: module:Class, …}` and can be imported, before anything is built."""
    if not isinstance(spec, dict) or not isinstance(spec.get("target"), str):
        raise ConfigError(f"{key}: {spec!r}: write {{target: module:Class, …}} with the arguments of the class")
    find(spec["target"], f"{key}.target", kind, factories=True)
    return spec


def _find_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    require("metrics", "task.metrics: a metric")
    import torchmetrics

    return {
        # Only rank 0 computes metrics, over the whole set, so synchronising them would wait for ever.
        key: _construct(torchmetrics, value, torchmetrics.Metric, f"task.metrics.{key}", sync_on_compute=False)
        for key, value in metrics.items()
    }


def _build_spec(spec: dict[str, Any], kind: type[T], key: str) -> T:
    arguments = {name: value for name, value in spec.items() if name != "target"}
    made: T = build(spec["target"], arguments, key, kind, factories=True)
    return made


def _construct(module: ModuleType, spec: Any, base: type[Any], key: str, **fixed: Any) -> Any:
    """Construct a subclass of `base` from its name in `module` or as module:Class, or from `{name: …, arguments}`."""
    arguments = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = arguments.pop("name", None)
    classes: dict[Any, Any] = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    if isinstance(name, str) and (":" in name or "." in name):  # torchmetrics.classification:MulticlassAccuracy
        path, _, name = name.replace(":", ".").rpartition(".")
        classes = {name: find(f"{path}:{name}", key, base)}
    if name not in classes:
        hint = did_you_mean(str(name), classes, f"; for example {', '.join(sorted(classes)[:3])}")
        what = f"is not a {base.__name__.strip('_')} in {module.__name__}, and not of the form module:Class"
        raise ConfigError(f"{key}: {name!r} {what}{hint}")
    if twice := arguments.keys() & fixed.keys():
        raise ConfigError(f"{key}.{twice.pop()}: is decided by distrib; leave it out")
    for argument in ("weight", "pos_weight"):
        if isinstance(arguments.get(argument), list):
            arguments[argument] = torch.tensor(arguments[argument], dtype=torch.float32)
    return call(classes[name], {**arguments, **fixed}, key)
