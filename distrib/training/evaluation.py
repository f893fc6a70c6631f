"""Exact evaluation: every sample once, metrics over the whole set, the same bits for any number of processes."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distrib.data.loader import data_loader
from distrib.data.order import derive_seed
from distrib.data.sampler import MicroBatch
from distrib.data.seeding import seeded
from distrib.errors import ConfigError
from distrib.task import Loss, Task
from distrib.training.engine import Engine
from distrib.world import World


def evaluate(engine: Engine, task: Task, dataset: Dataset[Any], batch_size: int, **loading: Any) -> dict[str, float]:
    """The task's metrics over `dataset`, and its mean `loss`, on every rank. `loading` as for `data_loader`.

    The dataset is cut into the same batches whatever the number of processes, and each rank takes a contiguous block
    of them. Rows are gathered on rank 0 alone, in dataset order, and the metrics are computed there.
    """
    world, size = engine.world, len(dataset)  # type: ignore[arg-type]
    batches = list(_batches(size, batch_size, world))
    num_own = len(batches)
    if engine.placement.forward_is_collective:  # all ranks run equally many; what is too many is dropped
        most = math.ceil(math.ceil(size / batch_size) / world.world_size)
        first = np.arange(min(batch_size, size), dtype=np.uint64)
        batches += [MicroBatch(first, first)] * (most - num_own)
    loader = data_loader(dataset, batches, seed=engine.seed, **loading)
    model = engine.placement.evaluation_model
    engine.share_buffers()
    was_training = model.training
    model.eval()
    try:
        rows, losses = _rows(engine, task, model, loader, num_own)
    finally:
        model.train(was_training)
    gathered = world.gather_rows(rows)
    gathered_losses = world.gather_rows({"losses": losses} if len(losses) else {})

    def metrics() -> dict[str, float]:
        assert gathered is not None, "this is rank 0"
        assert gathered_losses is not None, "this is rank 0"
        for key, value in gathered.items():
            if len(value) != size:
                raise ConfigError(
                    f"task.predict: {key!r} has {len(value)} rows for {size} samples; give one row a sample"
                )
        total, count = (math.fsum(column) for column in gathered_losses["losses"].T.tolist())
        result = {"loss": total / count if count else math.nan}
        with seeded("metrics", engine.seed):
            computed = task.metrics(gathered)
        result.update({key: float(value) for key, value in computed.items()})
        return result

    return world.on_rank_0(metrics)


def _batches(size: int, batch_size: int, world: World) -> Iterator[MicroBatch]:
    """This rank's block of the batches `[0, B), [B, 2B), …`, the last of which may be short."""
    num_batches = -(-size // batch_size)
    first, last = (num_batches * rank // world.world_size for rank in (world.rank, world.rank + 1))
    for number in range(first, last):
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, size), dtype=np.uint64)
        yield MicroBatch(indices, indices)


def _rows(engine: Engine, task: Task, model: nn.Module, loader: Any, num_own: int) -> tuple[dict[str, Tensor], Tensor]:
    """The task's rows of this rank's `num_own` batches on the CPU, and (total, count) of their loss, (num_own, 2)."""
    parts: dict[str, list[Tensor]] = {}
    losses: list[Tensor] = []
    unread: list[tuple[Loss, dict[str, Tensor]]] = []  # of the last batch: read when the next is on its way

    def read_last() -> None:
        for loss, predicted in unread:
            losses.append(torch.tensor([float(loss.total), float(loss.count)], dtype=torch.float64))
            for key, value in predicted.items():
                parts.setdefault(key, []).append(value.cpu())
        unread.clear()

    with torch.no_grad(), engine.autocast():
        for number, read in enumerate(loader):
            batch = engine.to_device(read.batch)
            engine.seed_random(derive_seed(engine.seed, int(read.micro_batch.positions[0])))
            output = task.forward(model, batch)
            if number < num_own:
                made = task.loss(output, batch), task.predict(output, batch)
                read_last()
                unread.append(made)
    read_last()
    rows = {key: torch.cat(values) for key, values in parts.items()}
    return rows, torch.stack(losses) if losses else torch.empty(0, 2, dtype=torch.float64)
