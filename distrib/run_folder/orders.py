"""The order in which a run reads its samples, as far as its folder tells it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distrib.config import Config
from distrib.data.limit import Limited
from distrib.data.mixture import Mixed
from distrib.data.order import Order, Positions, digest
from distrib.data.shards import ShardOrder
from distrib.plan import RunPlan
from distrib.run_folder.folder import RunDir


class _Positions(Order):
    """The order of a stream: its samples have no index, so that of a sample is its position."""

    def indices(self, positions: Positions) -> Positions:
        return positions


def recorded(run: RunDir, plan: RunPlan, config: Config, manifests: Sequence[dict[str, Any]]) -> Order | None:
    """Return the order of a run's samples; None if it does not follow from the folder alone.

    `manifests`: those of the valid checkpoints. The newest knows the lengths of a stream's shards.
    """
    data = (run.environment_or_nothing().get("data") or {}).get("train_dataset") or {}
    order = data.get("order")
    if order is not None and order["by"] == "sources":
        return Mixed(order["names"], order["sizes"], order["shares"], config.seed)
    if order is not None and order["by"] == "shards":
        newest = max(manifests, key=lambda manifest: int(manifest["step"]), default=dict[str, Any](step=0, stream={}))
        found = newest["stream"]["lengths"] if newest["stream"] else {}
        lengths, size = {int(shard): int(length) for shard, length in found.items()}, plan.micro_batch_size
        return ShardOrder(order["count"], plan.global_batch_size, size, config.seed, lengths, newest["step"])
    if order is not None:
        return None
    if plan.num_samples is None:
        return _Positions(0, config.seed)
    whole = Order(plan.num_samples, config.seed)
    length = data.get("length", None if config.data.limit else plan.num_samples)
    if length is None:
        return None
    return whole if length == plan.num_samples else Limited(whole, length)


def digest_of(order: Order, plan: RunPlan, step: int) -> str | None:
    """Return the digest of the samples of a step, over all ranks; None if it is not known yet."""
    if isinstance(order, ShardOrder) and not order.knows(step):
        return None
    positions = np.arange(plan.global_batch_size, dtype=np.uint64) + np.uint64(step * plan.global_batch_size)
    return f"{digest(positions, order.indices(positions)):016x}"
