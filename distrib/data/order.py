"""The shuffled order of the samples: a keyed permutation of the dataset, computed in O(1) at any position.

A run reads positions 0, 1, 2, … Position `p` is in epoch `p // size`, and each epoch has its own permutation of
`0..size-1`: a Feistel network (Luby and Rackoff, 1988) over the smallest power of two that is at least `size`, with
cycle walking (Black and Rogaway, 2002) for values that are not below `size`. Nothing is stored, so step 10^6 of a
dataset with 10^12 samples costs no more than step 0.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.uint64]

# The number of rounds is even, so that the two halves end where they began. Small datasets need more rounds: with
# halves of two or three bits, a chi-square test over 40,000 epochs detects a bias after 8 rounds, and none after 12.
_ROUNDS, _ROUNDS_IF_SMALL, _SMALL_BITS = 6, 12, 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's multipliers
# Converted to numpy once: a conversion in each call would take as long as the arithmetic of a micro-batch.
_STEPS = tuple(map(np.uint64, (_GOLDEN, 30, _FIRST, 27, _SECOND, 31)))
_WEYL = np.uint64(0xD1342543DE82EF95)  # odd, so that pairs of neighbours stay far apart


def derive_seed(*values: int) -> int:
    """Return a 64-bit seed for a tuple of integers (splitmix64). Neighbouring tuples get unrelated seeds."""
    state = len(values)
    for value in values:
        state = (state + (value & _MASK) * _GOLDEN + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def sample_indices(positions: Positions, size: int, seed: int, shuffle: bool = True) -> Positions:
    """Return the dataset index at each of the run's `positions`, for a dataset of `size` samples."""
    epochs: Positions = positions // np.uint64(size)
    offsets: Positions = positions % np.uint64(size)
    return _permute(offsets, size, epochs, seed) if shuffle else offsets


class Order:
    """The sample at each position of a run: a function of the position, and so the same for any number of processes.

    By default each epoch is a permutation of its own.
    """

    samples_recur = False  # whether an epoch may have a sample twice; then each time it has its own random numbers

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        """`size`: the number of positions in an epoch."""
        self.size, self.seed, self.shuffle = size, seed, shuffle

    def indices(self, positions: Positions) -> Positions:
        """Return the dataset index at each of the run's positions."""
        return sample_indices(positions, self.size, self.seed, self.shuffle)

    def record(self) -> dict[str, Any] | None:
        """Return what identifies the order besides size and seed, for environment.json; None for a permutation."""
        return None


def digest(positions: Positions, indices: Positions) -> int:
    """Return a 64-bit digest of (position, index) pairs. It ignores order: digests of disjoint parts add modulo
    2^64."""
    return int(mix(positions * _WEYL + indices).sum(dtype=np.uint64))


def _permute(offsets: Positions, size: int, epochs: Positions, seed: int) -> Positions:
    bits = (size - 1).bit_length()
    if bits < 2:  # a Feistel network needs two halves
        swapped = mix(epochs ^ np.uint64(derive_seed(seed))) >> np.uint64(63)
        order: Positions = (offsets + swapped) % np.uint64(size)
        return order
    rounds = _ROUNDS if bits > _SMALL_BITS else _ROUNDS_IF_SMALL
    keys = [mix(epochs ^ np.uint64(derive_seed(seed, number))) for number in range(rounds)]
    values: Positions = _feistel(offsets, bits, keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], bits, [key[outside] for key in keys])
    return values


def _feistel(values: Positions, bits: int, keys: list[Positions]) -> Positions:
    narrow, wide = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    left, right = values >> wide, values & ((one << wide) - one)
    width, other = narrow, wide  # of left and right; they swap every round
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & ((one << width) - one))
        width, other = other, width
    joined: Positions = (left << other) | right
    return joined


def mix(values: Positions) -> Positions:
    """splitmix64's finalizer, elementwise."""
    golden, shift, first, second_shift, second, last_shift = _STEPS
    values = values * golden
    values ^= values >> shift
    values *= first
    values ^= values >> second_shift
    values *= second
    values ^= values >> last_shift
    return values
