"""Checks what the methods of a Task return. Each check raises a ConfigError that names the method, what it returned
and what it should return."""

import dataclasses
import numbers
import re
import traceback
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distrib.data.shapes import describe
from distrib.errors import ConfigError, DistribError
from distrib.monitor.metrics import FROM_LEDGER
from distrib.processes.failures import is_collective
from distrib.task import Loss, Task
from distrib.tracebacks import first_line, users_lines

_NO_DATASETS = (tuple, Mapping, str, bytes, nn.Module)  # (inputs, targets) would look like a dataset of two samples
_DEVICE_FAULTS = ("out of memory", "cuda error", "cublas", "cudnn", "hip error", "nccl")
_TAKEN = (*FROM_LEDGER, "skipped")  # names of distrib's own numbers of a step, `train/…`
_METHODS = ("forward", "loss", "predict", "metrics")


def check_dataset(value: Any, method: str) -> Dataset[Any]:
    """Check what train_dataset or eval_dataset returned: a Dataset, or an object used like one, such as a list."""
    if isinstance(value, DataLoader):
        raise ConfigError(
            f"task.{method}: returned a DataLoader; return its dataset, because distrib makes the batches itself "
            "(data.micro_batch_size, data.num_workers)"
        )
    indexable = hasattr(value, "__getitem__") and not isinstance(value, _NO_DATASETS)
    if not indexable and not isinstance(value, Dataset):
        raise ConfigError(
            f"task.{method}: returned {describe(value)}; return a Dataset of single samples with __len__ and "
            "__getitem__, such as torch.utils.data.TensorDataset(inputs, targets)"
        )
    if isinstance(value, IterableDataset) and method == "train_dataset":
        return value
    if isinstance(value, IterableDataset):
        raise ConfigError(
            f"task.{method}: {type(value).__name__} is an IterableDataset; return a Dataset with __len__ and "
            "__getitem__, because each sample is evaluated once, whatever the number of processes"
        )
    if not isinstance(value, Sized):
        raise ConfigError(f"task.{method}: {type(value).__name__} has no __len__; its order could not be reproduced")
    return value  # type: ignore[return-value]


def check_model(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        shown = f"the class {value.__name__}, not an instance" if isinstance(value, type) else describe(value)
        raise ConfigError(f"task.model: returned {shown}; return a torch.nn.Module")
    return value


def check_blocks(value: Any) -> list[nn.Module]:
    if not isinstance(value, list | tuple | nn.ModuleList) or not all(isinstance(block, nn.Module) for block in value):
        raise ConfigError(f"task.blocks: returned {describe(value)}; return a list of the model's modules")
    return list(value)


def check_eval_datasets(value: Any) -> dict[str, Any]:
    """Check what eval_datasets returned: names, each a part of a metric's name, and datasets."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"task.eval_datasets: returned {describe(value)}; return a dict of datasets by name")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]*)?", name):
            raise ConfigError(f"task.eval_datasets: {name!r} is no name; give letters, digits, '_', '-', and later '.'")
    return dict(value)


def check_optimizer(value: Any) -> Optimizer | None:
    """Check for an optimizer or None. A wrapper with the attributes of a torch optimizer is accepted too."""
    if value is not None and not all(hasattr(value, name) for name in ("param_groups", "state", "step")):
        raise ConfigError(
            f"task.optimizer: returned {describe(value)}; return a torch.optim.Optimizer alone (the schedule is the "
            "config's), or None for the config's optimizer"
        )
    return value  # type: ignore[no-any-return]


def check_loss(value: Any, for_training: bool = False) -> Loss:
    """Return the loss, with a count that is an int, a float or a tensor. `for_training`: the total needs a gradient.

    This is cheap enough for each micro-batch, and never waits for a device.
    """
    wanted = "return distrib.Loss(sum of the losses, number of items)"
    if not isinstance(value, Loss):
        raise ConfigError(f"task.loss: returned {describe(value)}; {wanted}")
    total, count = value.total, value.count
    if not isinstance(total, Tensor) or total.numel() != 1 or not total.is_floating_point():
        raise ConfigError(f"task.loss: the total of the Loss is {describe(total)}, not a scalar tensor; {wanted}")
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.is_complex():
            raise ConfigError(f"task.loss: the count of the Loss is {describe(count)}, not one number; {wanted}")
    elif type(count) not in (int, float) and (isinstance(count, bool) or not _is_number(count)):
        raise ConfigError(f"task.loss: the count of the Loss is {describe(count)}, not a number; {wanted}")
    elif not 0 <= count < float("inf"):
        raise ConfigError(f"task.loss: the count of the Loss is {count}, not 0 or more; {wanted}")
    if for_training and not total.requires_grad:
        raise ConfigError(
            "task.loss: the total of the Loss does not depend on the model's parameters; compute it from the output "
            "with torch's operations, without detach(), item() or no_grad()"
        )
    if value.sums:
        _check_sums(value.sums)
    if isinstance(count, Tensor) or type(count) in (int, float):
        return value
    return dataclasses.replace(value, count=_plain(count))


def _check_sums(sums: Any) -> None:
    """Check the numbers that a Loss brings along; they are read later, where they may be on a device."""
    wanted = 'give each name two numbers, such as sums={"accuracy": (right, n)}'
    if not isinstance(sums, Mapping):
        raise ConfigError(f"task.loss: the sums of the Loss are {describe(sums)}; {wanted}")
    for name, pair in sums.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", name) or name in _TAKEN:
            raise ConfigError(
                f"task.loss: {name!r} cannot be the name of a sum; give letters, digits, '.', '_', '-' and '/', and "
                f"none of distrib's own names ({', '.join(_TAKEN)})"
            )
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(_is_one_number, pair)):
            raise ConfigError(f"task.loss: the sum {name!r} is {describe(pair)}; {wanted}")


def check_rows(value: Any, size: int) -> dict[str, Tensor | list[Any]]:
    """Check what predict returned for a batch of `size` samples."""
    wanted = "a tensor or a list (of strings, of tensors of different lengths) with one entry a sample"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"task.predict: returned {describe(value)}; return a dict that gives each name {wanted}")
    for key, rows in value.items():
        if not isinstance(rows, list) and not (isinstance(rows, Tensor) and rows.ndim):
            raise ConfigError(f"task.predict: {key!r} is {describe(rows)}; give {wanted}")
        if len(rows) != size:
            raise ConfigError(
                f"task.predict: {key!r} has {len(rows)} rows for a batch of {size} samples; give {wanted}"
            )
    return dict(value)


def check_metrics_dict(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f'task.metrics: returned {describe(value)}; return a dict such as {{"accuracy": 0.9}}')


def check_metrics(value: Any) -> dict[str, float]:
    """Return the metrics as floats. A tensor or array with one element counts as a number."""
    check_metrics_dict(value)
    if (wrong := no_metric(value)) is not None:
        raise ConfigError(f"task.metrics: {wrong}")
    return {key: float(number) for key, number in value.items()}


def no_metric(metrics: Mapping[str, Any]) -> str | None:
    """Describe the first metric that is not one number; None if all are."""
    for key, number in metrics.items():
        if not isinstance(key, str) or isinstance(number, str) or not _is_number(number):
            return f"{key!r} is {describe(number)}; give each name one number"
    return None


@contextmanager
def trial() -> Iterator[None]:
    """Turn an exception from a task's method into a ConfigError, around the first calls of a run.

    Errors that may not recur on another start are left unchanged: a lost connection, lack of memory, a device fault.
    """
    try:
        yield
    except (DistribError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        frame = _method_frame(error)
        if frame is None or is_collective(error) or any(word in str(error).lower() for word in _DEVICE_FAULTS):
            raise
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # torch's own message is better
            raise
        raise ConfigError(_failure(error, frame)) from error


def _failure(error: Exception, frame: FrameType) -> str:
    method, arguments = frame.f_code.co_name, frame.f_code.co_varnames[: frame.f_code.co_argcount]
    given = len(arguments) == 3 and method != "metrics"  # self, model or output, batch
    batch = f"; the batch is {describe(frame.f_locals[arguments[2]])}" if given else ""
    if (lines := users_lines(error)) is not None:
        return f"task.{method} failed on its first batch{batch}\n{lines}"
    if frame.f_code is Task.forward.__code__:
        return (
            f"task.forward: the default calls model(batch[0]), which raised {first_line(error)}{batch}; override "
            "forward(self, model, batch) if the model takes something else"
        )
    return f"task.{method}: {first_line(error)}{batch}"


def _method_frame(error: Exception) -> FrameType | None:
    """Return the frame of the innermost task method that the exception passed through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name in _METHODS]
    of_tasks = [frame for frame in frames if isinstance(frame.f_locals.get("self"), Task)]
    return of_tasks[-1] if of_tasks else None


def _plain(count: Any) -> int | float:
    """Convert a number of numpy or another library to an int, if its type is integral, or to a float."""
    number = count.item() if hasattr(count, "item") else count
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _is_one_number(value: Any) -> bool:
    """Return whether it is a number or a tensor with one, without waiting for a device."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return not isinstance(value, str) and _is_number(value)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
