"""Several datasets mixed in fixed proportions, as a function of the position."""

import math
from collections.abc import Mapping, Sequence, Sized
from fractions import Fraction
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from distrib.data.order import Order, Positions, derive_seed, sample_indices
from distrib.data.shapes import describe
from distrib.errors import ConfigError

_MARK = 0x3177  # separates the orders of the sources from others that are derived from the config's seed
_MOST_SHARES = 2**31 - 1  # so that a product of two fits into 64 bits
_WANTED = 'give Mixture({"first": (dataset, weight), "second": (dataset, weight)})'


class Mixture(ConcatDataset[Any]):
    """Reads several datasets in proportion to weights, when a run trains on it.

    `Mixture({"code": (code, 0.7), "text": (text, 0.3)})` reads 7 samples of `code` for 3 of `text`, all through the
    run. Each dataset has epochs of its own: all its samples are read once before one is read again. As a dataset, the
    mixture is its datasets one after the other, so that an evaluation reads each sample once.
    """

    def __init__(self, sources: Mapping[str, tuple[Dataset[Any], float]]) -> None:
        """`sources`: for each name a dataset with a length, and its relative weight. Raises ConfigError."""
        if not isinstance(sources, Mapping) or not sources:
            raise ConfigError(f"Mixture: got {describe(sources)}; {_WANTED}")
        for name, source in sources.items():
            _check(name, source)
        super().__init__([dataset for dataset, _ in sources.values()])
        if not any(weight for _, weight in sources.values()):
            raise ConfigError("Mixture: all weights are 0; give at least one dataset a weight above 0")
        self.names = [str(name) for name in sources]
        self.shares = _shares([weight for _, weight in sources.values()])

    def order(self, seed: int) -> "Mixed":
        """Return the order of the samples in a run with this seed."""
        sizes = [len(dataset) for dataset in self.datasets]  # type: ignore[arg-type]
        return Mixed(self.names, sizes, self.shares, seed)


class Mixed(Order):
    """The order of a Mixture. Its indices are those of the datasets one after the other.

    Before each position, the number of samples read from a dataset differs from its share by at most
    (1 + 1 + 1/2 + … + 1/(n - 1)) / 2 samples, where n is the number of datasets: by less than 2 for up to ten.
    """

    samples_recur = True

    def __init__(self, names: Sequence[str], sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        """`shares`: a whole number for each dataset, in sum less than 2**31."""
        super().__init__(sum(sizes), seed)
        self.names, self.sizes, self.shares = list(names), list(sizes), list(shares)
        self._first = np.cumsum([0, *self.sizes[:-1]], dtype=np.uint64)  # index of each dataset's first sample
        # The largest share first, for which the bound above holds.
        self._ranked = sorted((i for i, share in enumerate(shares) if share), key=lambda i: -self.shares[i])

    def counts(self, positions: Positions) -> Positions:
        """Return how many samples of each dataset are read before each position, shape (datasets, positions).

        The first dataset gets its share of all positions, rounded. The second gets its share of the rest, and so on.
        """
        found = np.zeros((len(self.sizes), len(positions)), dtype=np.uint64)
        rest, of = positions, sum(self.shares)
        for number in self._ranked:
            found[number] = _rounded(rest, self.shares[number], of)
            rest, of = rest - found[number], of - self.shares[number]
        return found

    def indices(self, positions: Positions) -> Positions:
        before = self.counts(positions)
        sources = (self.counts(positions + np.uint64(1)) - before).argmax(axis=0)
        found = np.empty_like(positions)
        for number in self._ranked:
            here = np.flatnonzero(sources == number)
            seed = derive_seed(self.seed, _MARK, number)
            found[here] = self._first[number] + sample_indices(before[number, here], self.sizes[number], seed)
        return found

    def record(self) -> dict[str, Any]:
        return {"by": "sources", "names": self.names, "sizes": self.sizes, "shares": self.shares}


def _rounded(values: Positions, share: int, of: int) -> Positions:
    """Return values * share / of, rounded, without overflow."""
    wholes, rests = np.divmod(values, np.uint64(of))
    part: Positions = (rests * np.uint64(2 * share) + np.uint64(of)) // np.uint64(2 * of)
    whole: Positions = wholes * np.uint64(share) + part
    return whole


def _shares(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to the weights: exactly, if their decimals allow it, else within 2**-31."""
    exact = [Fraction(str(float(weight))) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    if (of := math.lcm(*(weight.denominator for weight in exact))) <= _MOST_SHARES:
        return [int(weight * of) for weight in exact]
    shares = [max(1, round(weight * _MOST_SHARES)) if weight else 0 for weight in exact]
    shares[shares.index(max(shares))] += _MOST_SHARES - sum(shares)
    return shares


def _check(name: Any, source: Any) -> None:
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise ConfigError(f"Mixture: {name!r} is {describe(source)}; {_WANTED}")
    dataset, weight = source
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise ConfigError(f"Mixture: {name!r} is {describe(dataset)}; give a dataset with __len__ and __getitem__")
    if isinstance(dataset, Mixture):
        raise ConfigError(f"Mixture: {name!r} is a Mixture itself; give its datasets to one Mixture")
    if not len(dataset):
        raise ConfigError(f"Mixture: {name!r} has no samples; leave it out")
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(weight, str) or not 0 <= number < math.inf:
        raise ConfigError(f"Mixture: {name!r} has the weight {weight!r}; give a finite number, 0 or more")
