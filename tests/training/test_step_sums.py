"""The sums of a step: what the ranks learn of each other's learning rates."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from distrib.strategies.step_sums import SIZE, StepSums, mark_of
from distrib.task import Loss

MARKS = st.integers(0, 63)


def summed(marks: list[int]) -> StepSums:
    """Return the sums of ranks that have these marks, and two micro-batches each."""
    loss = Loss(torch.tensor(2.0), 3)
    parts = [StepSums.pack(loss, 5, mark=mark) + StepSums.pack(loss, 0) for mark in marks]
    return StepSums.unpack(torch.stack(parts).sum(0).tolist())


@given(st.lists(MARKS, min_size=1, max_size=20))
def test_marks_are_compared(marks: list[int]) -> None:
    found = summed(marks)
    assert found.same_rates == (len(set(marks)) == 1)
    assert (found.loss, found.count, found.digest) == (4.0 * len(marks), 6 * len(marks), 5 * len(marks))


@given(MARKS, MARKS, st.integers(1, 4096))
def test_the_sums_are_exact_on_many_ranks(mark: int, other: int, ranks: int) -> None:
    loss = Loss(torch.tensor(1.0), 1)
    one = StepSums.pack(loss, 0, mark=mark)
    assert one.shape == (SIZE,)
    sums = one * (ranks - 1) + StepSums.pack(loss, 0, mark=other)  # in float32
    assert StepSums.unpack(sums.tolist()).same_rates == (ranks == 1 or mark == other)


def test_marks_of_close_rates_differ() -> None:
    rates = [0.001 * (1 + 1e-9 * number) for number in range(6400)]
    counts = torch.bincount(torch.tensor([mark_of(rate) for rate in rates]), minlength=64)
    assert counts.min() > 40
    assert counts.max() < 170
