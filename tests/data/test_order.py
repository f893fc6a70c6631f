import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from distrib.data.order import derive_seed, digest, sample_indices

SIZES = st.integers(1, 5000)
SEEDS = st.integers(0, 2**63 - 1)


def positions(first: int, count: int) -> "np.ndarray":
    return np.arange(first, first + count, dtype=np.uint64)


@given(SIZES, SEEDS, st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    indices = sample_indices(positions(epoch * size, size), size, seed)
    assert sorted(indices.tolist()) == list(range(size))


@given(st.integers(12, 5000), SEEDS, st.integers(0, 10**6))
def test_epochs_and_seeds_have_different_orders(size: int, seed: int, epoch: int) -> None:
    # there are 12! permutations, so two equal ones by chance are practically impossible
    this = sample_indices(positions(epoch * size, size), size, seed).tolist()
    assert this != sample_indices(positions((epoch + 1) * size, size), size, seed).tolist()
    assert this != sample_indices(positions(epoch * size, size), size, seed + 1).tolist()


@given(SIZES, SEEDS, st.integers(0, 10**9), st.integers(1, 300), st.integers(0, 300))
def test_any_position_can_be_computed_directly(size: int, seed: int, first: int, count: int, skip: int) -> None:
    walked = sample_indices(positions(first, skip + count), size, seed)[skip:]
    assert sample_indices(positions(first + skip, count), size, seed).tolist() == walked.tolist()


@given(SIZES, st.integers(0, 10**6))
def test_without_shuffling_the_order_is_that_of_the_dataset(size: int, first: int) -> None:
    indices = sample_indices(positions(first, 50), size, 0, shuffle=False)
    assert indices.tolist() == [position % size for position in range(first, first + 50)]


@settings(max_examples=20)
@given(st.integers(10**9, 10**12), SEEDS)
def test_huge_datasets_cost_no_memory(size: int, seed: int) -> None:
    tracemalloc.start()
    indices = sample_indices(positions(10**6 * 512, 512), size, seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(indices.tolist())) == 512
    assert indices.max() < size


@pytest.mark.parametrize("size", [3, 5, 6, 7, 13, 300])
def test_every_sample_is_equally_likely_at_every_position(size: int) -> None:
    epochs = 40_000 if size < 100 else 4_000
    indices = sample_indices(positions(0, size * epochs), size, seed=1).reshape(epochs, size)
    counts = np.stack([np.bincount(indices[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    # Of random permutations, this is chi-square distributed with (size - 1)^2 degrees of freedom once scaled. The seed
    # is fixed, so the test cannot fail by chance; the bound is one chance in ten thousand.
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert statistic < chi2.isf(1e-4, (size - 1) ** 2)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), max_size=50), st.randoms())
def test_the_digest_adds_up_in_any_order(pairs: list[tuple[int, int]], random: object) -> None:
    def of(part: list[tuple[int, int]]) -> int:
        columns = np.array(part, dtype=np.uint64).reshape(-1, 2)
        return digest(columns[:, 0], columns[:, 1])

    whole = of(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = len(pairs) // 3
    assert (of(shuffled[:cut]) + of(shuffled[cut:])) % 2**64 == whole
    if pairs:
        changed = [(pairs[0][0], pairs[0][1] + 1), *pairs[1:]]
        assert of(changed) != whole


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=2, unique=True))
def test_seeds_of_different_tuples_differ(tuples: list[tuple[int, int]]) -> None:
    assert len({derive_seed(*values) for values in tuples}) == len(tuples)
