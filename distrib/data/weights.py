"""Weighted sampling with replacement, as a function of the position: Walker's alias method (1977).

Each sample has a column of the same height. The lower part of a column belongs to its own sample, the rest to one other
sample, its alias. A draw is two random numbers of the position: a column, and a height in it. So a draw costs the same
at any position and for any number of samples.
"""

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrib.data.order import Order, Positions, derive_seed, mix

MOST_WEIGHTS = 2**32 - 1
_BITS = 62  # of the sum of all shares, which are integers, so that every machine has the same table
_MARK = 0x3A17  # separates these random numbers from others that are derived from the config's seed
_CHUNK = 2**16
_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


class Weighted(Order):
    """Draws each sample with a probability proportional to its weight. An epoch has as many draws as there are samples.

    Probabilities are rounded to multiples of less than 2**-60.
    """

    samples_recur = True

    def __init__(self, weights: NDArray[np.float64], seed: int) -> None:
        """`weights`: one for each sample, finite, 0 or more, not all 0."""
        super().__init__(len(weights), seed)
        shares, self._bits = _shares(weights)
        self.thresholds, self.aliases = _alias_table(shares, 1 << self._bits)
        self._digest = hashlib.sha256(shares.astype("<i8").tobytes()).hexdigest()[:16]
        self._keys = [np.uint64(derive_seed(seed, _MARK, number)) for number in range(2)]

    def indices(self, positions: Positions) -> Positions:
        column_key, height_key = self._keys
        columns = _scaled(mix(positions ^ column_key), self.size)
        heights = mix(positions ^ height_key) >> np.uint64(64 - self._bits)
        drawn: Positions = np.where(heights < self.thresholds[columns], columns, self.aliases[columns])
        return drawn

    def record(self) -> dict[str, Any]:
        return {"by": "weights", "digest": self._digest}


def _shares(weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """Return integers in proportion to the weights, with the mean 2**bits, and bits."""
    size = len(weights)
    bits = _BITS - size.bit_length()
    relative = weights / weights.max()
    # In chunks, because the rounding of one long sum would grow with its length; by cumsum, whose order is fixed.
    total = math.fsum(float(np.cumsum(relative[first : first + _CHUNK])[-1]) for first in range(0, size, _CHUNK))
    shares = np.rint(relative * (size / total * 2.0**bits)).astype(np.int64)
    shares[shares.argmax()] += (size << bits) - int(shares.sum())  # what rounding has left
    return shares, bits


def _alias_table(shares: NDArray[np.int64], height: int) -> tuple[Positions, Positions]:
    """Return the threshold and the alias of each column: heights below the threshold belong to the column's own sample.

    Light samples, whose share is less than a column, are filled up one after the other from the surplus of the heavy
    ones, also one after the other. A heavy sample that has given more than its surplus is filled up from the next heavy
    one. So all follows from the sums of lacks and surpluses (Hübschle-Schneider and Sanders, 2022).
    """
    light, heavy = np.flatnonzero(shares <= height), np.flatnonzero(shares > height)
    thresholds, aliases = shares.astype(np.uint64), np.arange(len(shares), dtype=np.uint64)
    if len(heavy):
        lacks, surpluses = np.cumsum(height - shares[light]), np.cumsum(shares[heavy] - height)
        before = np.concatenate([[0], lacks[:-1]])
        giving = np.searchsorted(surpluses, before, side="right")
        aliases[light] = heavy[np.minimum(giving, len(heavy) - 1)]
        last = np.searchsorted(lacks, surpluses, side="left")  # the light sample that uses up each heavy one
        thresholds[heavy] = height - (lacks[last] - surpluses)
        aliases[heavy[:-1]] = heavy[1:]
    return thresholds, aliases


def _scaled(values: Positions, size: int) -> Positions:
    """Return floor(value * size / 2**64), exactly. `size`: less than 2**32."""
    factor = np.uint64(size)
    high: Positions = ((values >> _HALF) * factor + ((values & _LOW) * factor >> _HALF)) >> _HALF
    return high
