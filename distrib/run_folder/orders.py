"""The order in which a run reads its samples, as far as its folder tells it."""

import numpy as np

from distrib.config import Config
from distrib.data.limit import Limited
from distrib.data.mixture import Mixed
from distrib.data.order import Order, Positions, digest
from distrib.plan import RunPlan
from distrib.run_folder.folder import RunDir


class _Positions(Order):
    """The order of a stream: its samples have no index, so that of a sample is its position."""

    def indices(self, positions: Positions) -> Positions:
        return positions


def recorded(run: RunDir, plan: RunPlan, config: Config) -> Order | None:
    """Return the order of a run's samples; None if it does not follow from the folder alone."""
    data = (run.environment_or_nothing().get("data") or {}).get("train_dataset") or {}
    order = data.get("order")
    if order is not None and order["by"] == "sources":
        return Mixed(order["names"], order["sizes"], order["shares"], config.seed)
    if order is not None:
        return None
    if plan.num_samples is None:
        return _Positions(0, config.seed)
    whole = Order(plan.num_samples, config.seed)
    length = data.get("length", None if config.data.limit else plan.num_samples)
    if length is None:
        return None
    return whole if length == plan.num_samples else Limited(whole, length)


def digest_of(order: Order, plan: RunPlan, step: int) -> str:
    """Return the digest of the samples of a step, over all ranks."""
    positions = np.arange(plan.global_batch_size, dtype=np.uint64) + np.uint64(step * plan.global_batch_size)
    return f"{digest(positions, order.indices(positions)):016x}"
