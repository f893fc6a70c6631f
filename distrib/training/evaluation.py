"""Exact evaluation: each sample once, metrics over the whole set, and the same bits for any number of processes."""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from distrib.data.loader import data_loader
from distrib.data.order import derive_seed
from distrib.data.sampler import MicroBatch
from distrib.data.seeding import seeded
from distrib.errors import ConfigError
from distrib.processes.world import World
from distrib.samples import encode
from distrib.task import Loss, Task, method_of, own_method
from distrib.training.engine import Engine
from distrib.training.task_checks import check_loss, check_metrics, check_rows


def evaluate(
    engine: Engine,
    task: Task,
    dataset: Dataset[Any],
    batch_size: int,
    name: str = "",
    keep: Callable[[Callable[[], dict[str, bytes]]], None] | None = None,
    **loading: Any,
) -> dict[str, float]:
    """Return the task's metrics over `dataset`, and the mean loss as `loss`, on every rank. Collective.

    `name`: of the evaluation set, for the task's `metrics` and `samples` if they want it. `keep`: called on rank 0 with
    a function that returns the files of the task's samples.

    The dataset is split into the same batches for any number of processes, and each rank takes a contiguous block of
    them. Rows are gathered on rank 0 in dataset order, and the metrics are computed there. `loading` as for
    `data_loader`. Raises ConfigError if the task returns something wrong.
    """
    size = len(dataset)  # type: ignore[arg-type]
    collect = predict(engine, task, dataset, size, batch_size, **loading)

    def metrics() -> dict[str, float]:
        rows, losses = collect()
        total, count = (math.fsum(column) for column in losses.T.tolist())
        with seeded("metrics", engine.seed):
            found = check_metrics(call_with_rows(method_of(task, "metrics"), rows, name))
        if keep is not None:
            keep(partial(samples, engine, task, rows, name))
        return {"loss": total / count if count else math.nan, **found}

    return engine.world.on_rank_0(metrics)


def call_with_rows(method: Callable[..., Any], rows: dict[str, Any], name: str) -> Any:
    """Call a task's `method(rows)`, or `method(rows, name)` if it takes the name of the evaluation set: a second
    parameter that has no default, or is called name."""
    _, *others = inspect.signature(method).parameters.values()
    takes_name = bool(others) and (others[0].default is inspect.Parameter.empty or others[0].name == "name")
    return method(rows, name) if takes_name else method(rows)


def samples(engine: Engine, task: Task, rows: dict[str, Any], name: str) -> dict[str, bytes]:
    """Return the files of the task's samples. Raises ConfigError if it returns something else."""
    own = own_method(task, "samples")
    if own is None:
        return {}
    with seeded("samples", engine.seed):
        return encode(call_with_rows(own, rows, name))


def predict(
    engine: Engine, task: Task, dataset: Dataset[Any], size: int, batch_size: int, **loading: Any
) -> Callable[[], tuple[dict[str, Any], Tensor]]:
    """Run the task over the first `size` samples, and return a function to call on rank 0. Collective.

    The function returns the rows in dataset order, and a tensor of shape (batches, 2) with the total and count of each
    batch's loss. It raises ConfigError if a rank found something wrong with its rows.
    """
    world = engine.world
    batches = list(_batches(size, batch_size, world))
    num_own = len(batches)
    if engine.strategy.forward_is_collective:  # all ranks must run equally many batches; surplus results are dropped
        most = math.ceil(math.ceil(size / batch_size) / world.world_size)
        first = np.arange(min(batch_size, size), dtype=np.uint64)
        batches += [MicroBatch(first, first)] * (most - num_own)
    loader = data_loader(dataset, batches, seed=engine.seed, **loading)
    model = engine.strategy.evaluation_model
    was_training = model.training
    model.eval()
    try:
        rows = _Rows()
        with engine.buffers.unchanged():
            _predict(engine, task, model, loader, num_own, rows)
    finally:
        model.train(was_training)
    parts, others = world.gather_rows(rows.joined()), world.gather_rows(rows.losses())

    def collected() -> tuple[dict[str, Any], Tensor]:
        if problems := _concatenate("problems", others["problems"]):
            raise ConfigError(problems[0])
        whole = {key: _concatenate(key, values) for key, values in parts.items()}
        for key, value in whole.items():
            if len(value) != size:
                raise ConfigError(f"task.predict: {key!r} has {len(value)} rows for {size} samples; give it for all")
        return whole, _concatenate("losses", others["losses"])

    return collected


def _batches(size: int, batch_size: int, world: World) -> Iterator[MicroBatch]:
    """Yield this rank's block of the batches `[0, B), [B, 2B), …`. The last batch may be smaller."""
    num_batches = -(-size // batch_size)
    first, last = (num_batches * rank // world.world_size for rank in (world.rank, world.rank + 1))
    for number in range(first, last):
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, size), dtype=np.uint64)
        yield MicroBatch(indices, indices)


def _predict(engine: Engine, task: Task, model: nn.Module, loader: Any, num_own: int, rows: "_Rows") -> None:
    """Add the losses and rows of this rank's `num_own` batches to `rows`."""
    unread: list[tuple[int, Loss, Any]] = []  # the last batch's results: reading them waits, so start the next first
    with torch.no_grad(), engine.autocast():
        for number, read in enumerate(loader):
            engine.buffers.restore()
            batch = engine.to_device(read.batch)
            engine.seed_random(derive_seed(engine.seed, int(read.micro_batch.positions[0])))
            output = task.forward(model, batch)
            if number < num_own:
                loss, predicted = check_loss(task.loss(output, batch)), method_of(task, "predict")(output, batch)
                made = len(read.micro_batch.indices), loss, predicted
                for last in unread:
                    rows.add(*last)
                unread = [made]
    for last in unread:
        rows.add(*last)


class _Rows:
    """The rows and losses of this rank's batches, on the CPU.

    Problems are collected too, and rank 0 raises them: if one rank raised alone, the others would wait for it.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Any]] = {}
        self._losses: list[Tensor] = []
        self._problems: list[str] = []

    def add(self, size: int, loss: Loss, predicted: Any) -> None:
        self._losses.append(torch.tensor([float(loss.total), float(loss.count)], dtype=torch.float64))
        try:
            for key, value in check_rows(predicted, size).items():
                self._parts.setdefault(key, []).append(tree_map_only(Tensor, Tensor.cpu, value))
        except ConfigError as error:
            self._problems.append(str(error))

    def joined(self) -> dict[str, Any]:
        """Return one tensor or list for each name."""
        try:
            return {key: _concatenate(key, values) for key, values in self._parts.items()}
        except ConfigError as error:
            self._problems.append(str(error))
            return {}

    def losses(self) -> dict[str, Any]:
        """Return `losses` (total and count of each batch's loss, shape (batches, 2)) and `problems`."""
        return {**({"losses": torch.stack(self._losses)} if self._losses else {}), "problems": self._problems}


def _concatenate(key: str, parts: list[Any]) -> Any:
    """Concatenate the rows of several batches. Raises ConfigError if their types or shapes differ."""
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    if not all(isinstance(part, Tensor) for part in parts):
        raise ConfigError(f"task.predict: {key!r} is a list in one batch and a tensor in another; give one of the two")
    shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
    if len(shapes) > 1:
        raise ConfigError(
            f"task.predict: {key!r} has rows of shape {shapes[0]} in one batch and {shapes[1]} in another; give a list "
            f"of them, list({key}), or pad them to one shape"
        )
    return torch.cat(parts)
