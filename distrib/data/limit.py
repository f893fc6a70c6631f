"""A part of a dataset for quick trials: samples that a keyed permutation chooses, so nothing is stored."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from distrib.data.order import Order, Positions, derive_seed, sample_indices

_MARK = 0x117A  # separates the choice from others that are derived from the config's seed


def chosen(numbers: Positions, size: int, seed: int) -> Positions:
    """Return the index of each chosen sample of a dataset of `size` samples. `numbers`: less than `size`."""
    return sample_indices(numbers, size, derive_seed(seed, _MARK))


class Limited(Order):
    """The order of another `Order` over as many samples as it has, chosen from `of` samples."""

    def __init__(self, inner: Order, of: int) -> None:
        super().__init__(inner.size, inner.seed)
        self.inner, self.of, self.samples_recur = inner, of, inner.samples_recur

    def indices(self, positions: Positions) -> Positions:
        return chosen(self.inner.indices(positions), self.of, self.seed)

    def record(self) -> dict[str, Any] | None:
        return self.inner.record()


def limited(dataset: Dataset[Any], limit: int | None, seed: int) -> Dataset[Any]:
    """Return so many samples of an evaluation set, in the order of the set; the whole set if it has no more."""
    size = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= size:
        return dataset
    return Subset(dataset, sorted(chosen(np.arange(limit, dtype=np.uint64), size, seed).tolist()))
