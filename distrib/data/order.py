"""Which sample stands where: a keyed permutation of the dataset, computed at any position in O(1).

The samples of a run are one endless row of positions. Position `p` lies in epoch `p // size`, and each epoch is
another permutation of `0..size-1`: a Feistel network (Luby and Rackoff, 1988) over the smallest power of two that
holds `size`, with cycle walking (Black and Rogaway, 2002) for the values that fall outside. Nothing is stored, so
step 10^6 of a 10^12-sample dataset costs what step 0 costs.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.uint64]

# Rounds, even so that the two halves end where they began. Few would do in cryptographic sizes; with halves of two
# or three bits a chi-square test of 40,000 epochs still sees 8 rounds, and not 12.
_ROUNDS, _ROUNDS_IF_SMALL, _SMALL_BITS = 6, 12, 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's multipliers
# As numpy has them: to make them of Python's numbers in each call takes as long as the arithmetic of a micro-batch.
_STEPS = tuple(map(np.uint64, (_GOLDEN, 30, _FIRST, 27, _SECOND, 31)))
_WEYL = np.uint64(0xD1342543DE82EF95)  # odd, so that pairs of neighbours stay far apart


def derive_seed(*values: int) -> int:
    """A 64-bit seed from a tuple of integers; neighbouring tuples give unrelated seeds (splitmix64)."""
    state = len(values)
    for value in values:
        state = (state + (value & _MASK) * _GOLDEN + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def sample_indices(positions: Positions, size: int, seed: int, shuffle: bool = True) -> Positions:
    """The dataset index at each position of the run, for a dataset of `size` samples."""
    epochs: Positions = positions // np.uint64(size)
    offsets: Positions = positions % np.uint64(size)
    return _permute(offsets, size, epochs, seed) if shuffle else offsets


def digest(positions: Positions, indices: Positions) -> int:
    """An order-free 64-bit digest of (position, index) pairs: digests of disjoint parts add up modulo 2^64."""
    return int(_mix(positions * _WEYL + indices).sum(dtype=np.uint64))


def _permute(offsets: Positions, size: int, epochs: Positions, seed: int) -> Positions:
    bits = (size - 1).bit_length()
    if bits < 2:  # one or two samples: too few for two halves
        swapped = _mix(epochs ^ np.uint64(derive_seed(seed))) >> np.uint64(63)
        order: Positions = (offsets + swapped) % np.uint64(size)
        return order
    rounds = _ROUNDS if bits > _SMALL_BITS else _ROUNDS_IF_SMALL
    keys = [_mix(epochs ^ np.uint64(derive_seed(seed, number))) for number in range(rounds)]
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
        left, right = right, left ^ (_mix(right ^ key) & ((one << width) - one))
        width, other = other, width
    joined: Positions = (left << other) | right
    return joined


def _mix(values: Positions) -> Positions:
    """splitmix64's finalizer, elementwise."""
    golden, shift, first, second_shift, second, last_shift = _STEPS
    values = values * golden
    values ^= values >> shift
    values *= first
    values ^= values >> second_shift
    values *= second
    values ^= values >> last_shift
    return values
