"""Finds a task's mistakes early: in a trial evaluation before the first step, and in the first step."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distrib.config import Config
from distrib.data.loader import Window
from distrib.data.seeding import seeded
from distrib.errors import ConfigError, DistribError
from distrib.monitor.run_log import RunLog
from distrib.strategies.base import Strategy
from distrib.task import Loss, Task, method_of
from distrib.tracebacks import first_line, place
from distrib.training import build, evaluation
from distrib.training.engine import Engine
from distrib.training.loop import train_step
from distrib.training.step_log import PendingStep
from distrib.training.task_checks import check_loss, check_metrics_dict, no_metric, trial

# If each sample is there twice, a mean has half the gradient of each sample and the same total; a sum has the same
# gradient and twice the total. The tolerances allow for rounding in all precisions.
_GRADIENT_TOLERANCE = 1e-2
_TOTAL_TOLERANCE = 1e-4
# The check copies the output and its gradient a few times, on their device. For a language model with a large
# vocabulary (4 x 2048 x 151,936) each copy takes 5 GB, so larger outputs than this (40 MB in float32) are not checked.
_MOST_ELEMENTS = 10_000_000


def first_step(engine: Engine, task: Task, window: Window, lr: float, micro_batch_size: int) -> PendingStep:
    """Make a training step that also checks the task. Raises ConfigError."""
    with trial():
        return train_step(engine, MeanLossCheck(task, engine.strategy, micro_batch_size), window, lr)


def warm_up_ddp_buckets(engine: Engine, task: Task, window: Window) -> None:
    """Call Engine.warm_up_ddp_buckets, and report errors of the task's methods. Raises ConfigError."""
    with trial():
        engine.warm_up_ddp_buckets(task, window)


def trial_evaluation(
    engine: Engine, task: Task, dataset: Dataset[Any], config: Config, record: RunLog, name: str = ""
) -> list[str] | None:
    """Evaluate two batches and drop the result, because the first real evaluation may be hours later. Collective.

    `name`: of the evaluation set. Returns the names of its metrics. Raises ConfigError. If `metrics` fails or a metric
    is not a number, it only warns and returns None, because more samples may be needed.
    """
    batch_size = config.data.micro_batch_size
    size = min(2 * batch_size, len(dataset))  # type: ignore[arg-type]
    loading = build.loading(config, engine.world, task)
    loading["num_workers"] = min(1, loading["num_workers"])
    with trial():
        collect = evaluation.predict(engine, task, dataset, size, batch_size, **loading)

    def metrics() -> list[str] | None:
        rows, _ = collect()
        names, method = None, "metrics"
        try:
            with seeded("metrics", engine.seed):
                found = evaluation.call_with_rows(method_of(task, "metrics"), rows, name)
            check_metrics_dict(found)
            doubt = no_metric(found)
            if doubt is None:
                names, method = ["loss", *found], "samples"
                evaluation.samples(engine, task, rows, name)
        except DistribError:
            raise
        except Exception as error:
            doubt = f"{first_line(error)}{place(error)}"
        if doubt is not None:
            record.warn(
                f"task.{method} failed on a trial with {size} samples: {doubt}; if it fails on the whole evaluation "
                f"set too, {'the run cannot finish' if names is None else 'there are none to look at'}"
            )
        return names

    return engine.world.on_rank_0(metrics)


class MeanLossCheck(Task):
    """Wraps a task in the first step, and raises ConfigError if the loss's total is a mean but its count is a size.

    With such a loss, the gradient is too small by a factor of the batch size. To detect it, the loss is also computed
    for a batch with each sample twice: then the count doubles, but the total does not. Only clear cases are refused.
    Nothing is decided if the batch cannot be repeated or has one sample, if the output is very large, or if the loss
    compares samples with one another.
    """

    def __init__(self, task: Task, strategy: Strategy, size: int) -> None:
        """`size`: samples in a micro-batch."""
        self.task, self.strategy, self.size = task, strategy, size
        self._checked = False

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return self.task.forward(model, batch)

    def loss(self, output: Any, batch: Any) -> Loss:
        loss = self.task.loss(output, batch)
        if not self._checked:
            self._checked = True
            check_loss(loss, for_training=True)
            self._refuse_mean(output, batch)
        return loss

    def _refuse_mean(self, output: Any, batch: Any) -> None:
        if self.size < 2:
            return
        try:
            mean = self._mean_by_gradient(output, batch)
        except _TooLargeError:
            return
        except Exception:  # the loss may not accept a batch of another size
            mean = None
        if mean is None and not self.strategy.forward_is_collective:  # otherwise a failure on one rank blocks the rest
            with suppress(Exception):
                mean = self._mean_by_total(batch)
        if mean:
            raise ConfigError(
                "task.loss: its total is a mean over the batch, but its count is the number of items: with each "
                "sample twice the count doubles and the total stays, so the gradient would be divided by the count "
                'twice; return distrib.Loss(sum of the losses, number of items), with reduction="sum"'
            )

    def _mean_by_gradient(self, output: Any, batch: Any) -> bool | None:
        """Compare the gradients with respect to the output. Needs no forward, and ignores terms such as
        regularisers."""
        gradients, counts = [], []
        for times in (1, 2):
            leaves: list[Tensor] = []
            loss = self._loss(_repeat_rows(output, self.size, times, leaves), _repeat_rows(batch, self.size, times))
            if not leaves or not loss.total.requires_grad:
                return None
            gradients.append(torch.autograd.grad(loss.total, leaves, allow_unused=True))
            counts.append(float(loss.count))
        pairs = [pair for pair in zip(*gradients, strict=True) if all(part is not None for part in pair)]
        norm = math.hypot(*(_norm(once) for once, _ in pairs))
        if not 0 < norm < math.inf:
            return None
        difference = math.hypot(*(_norm(once / 2 - twice[: self.size]) for once, twice in pairs))
        return difference < _GRADIENT_TOLERANCE * norm and _doubles(*counts)

    def _mean_by_total(self, batch: Any) -> bool:
        """Compare the totals in evaluation mode, for a model that computes the loss itself."""
        model = self.strategy.evaluation_model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), _copies_of_buffers(model):
                once, twice, half = (
                    self._loss(self.task.forward(model, part), part)
                    for part in (_repeat_rows(batch, self.size, times) for times in (1, 2, 0.5))
                )
        finally:
            model.train(was_training)
        total, change = float(once.total), abs(float(twice.total) - float(once.total))
        # Nothing follows from a total that does not depend on the samples (a large regulariser, zeros).
        depends = abs(float(half.total) - total) > 10 * _TOTAL_TOLERANCE * abs(total)
        same = change <= _TOTAL_TOLERANCE * abs(total)
        return depends and same and _doubles(float(once.count), float(twice.count))

    def _loss(self, output: Any, batch: Any) -> Loss:
        return check_loss(self.task.loss(output, batch))


@contextmanager
def _copies_of_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model copies of its buffers, and put the originals back on exit.

    The originals are not even written to, because writing would change the versions that training/buffers.py compares.
    """
    before = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}  # a tensor that two modules share stays one
    for module, buffers in before:
        for key, tensor in buffers.items():
            if tensor is not None:
                module._buffers[key] = copies.setdefault(id(tensor), tensor.detach().clone())
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


class _TooLargeError(Exception):
    """The output has too many elements to be copied."""


def _norm(part: Tensor) -> float:
    """Compute the norm on the tensor's device, at least in float32."""
    wide = torch.promote_types(part.dtype, torch.float32)
    return float(torch.linalg.vector_norm(part.to(wide)))


def _doubles(once: float, twice: float) -> bool:
    return once > 0 and math.isclose(twice, 2 * once, rel_tol=1e-6)


def _repeat_rows(value: Any, size: int, times: float, leaves: list[Tensor] | None = None) -> Any:
    """Return a copy in which each tensor with `size` rows has `times` as many: the rows repeated or cut off.

    If `leaves` is given, floating-point tensors require a gradient and are appended to it. Raises ValueError if it is
    unclear how a part relates to the samples, and _TooLargeError if a tensor that may get a gradient is too large.
    """
    if isinstance(value, Tensor):
        if leaves is not None and value.numel() > _MOST_ELEMENTS:
            raise _TooLargeError
        value = value.detach()
        if value.ndim and len(value) == size:
            rows = torch.arange(int(size * times), device=value.device) % size
            value = value.index_select(0, rows)
            if leaves is not None and value.is_floating_point():
                leaves.append(value.requires_grad_())
        elif value.ndim:
            raise ValueError("not one row a sample")
        else:
            value = value.clone()
        return value
    if isinstance(value, Mapping):
        parts = {key: _repeat_rows(part, size, times, leaves) for key, part in value.items()}
        if type(value) is dict:
            return parts
        other = copy.copy(value)  # another mapping class, such as transformers' ModelOutput
        for key, part in parts.items():
            other[key] = part  # type: ignore[index]
        return other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_repeat_rows(part, size, times, leaves) for part in value))
    if type(value) in (list, tuple):
        if len(value) == size and not any(isinstance(part, Tensor) for part in value):
            return type(value)(value[int(row)] for row in torch.arange(int(size * times)) % size)
        return type(value)(_repeat_rows(part, size, times, leaves) for part in value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"cannot repeat a {type(value).__name__}")
