from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from distrib.data.sampler import DistributedSampler


def sampler(size: int, **arguments: int) -> DistributedSampler:
    return DistributedSampler(TensorDataset(torch.arange(size)), **arguments)  # type: ignore[arg-type]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Draw size, micro_batch_size, micro-batches per step (divisible by 1, 2, 3 and 4 processes) and seed."""
    micro = draw(st.integers(1, 5))
    return draw(st.integers(1, 300)), micro, 12 * draw(st.integers(1, 2)), draw(st.integers(0, 99))


@given(shapes(), st.integers(0, 50))
def test_the_global_batches_are_the_same_for_any_number_of_processes(shape: tuple[int, ...], start: int) -> None:
    size, micro, num_micro, seed = shape

    def global_batches(world_size: int) -> list[list[tuple[list[int], list[int]]]]:
        ranks = [
            sampler(
                size,
                global_batch_size=micro * num_micro,
                micro_batch_size=micro,
                num_replicas=world_size,
                rank=rank,
                seed=seed,
                start=start,
                stop=start + 3,
            )
            for rank in range(world_size)
        ]
        batches = [[(m.positions.tolist(), m.indices.tolist()) for m in rank.micro_batches()] for rank in ranks]
        share = num_micro // world_size
        return [[m for rank in batches for m in rank[step * share : (step + 1) * share]] for step in range(3)]

    alone = global_batches(1)
    flat = [position for step in alone for positions, _ in step for position in positions]
    assert flat == list(range(start * micro * num_micro, (start + 3) * micro * num_micro))
    for world_size in (2, 3, 4):
        assert global_batches(world_size) == alone


@given(st.integers(1, 100), st.integers(1, 5))
def test_every_epoch_has_each_sample_once(size: int, epochs: int) -> None:
    steps = -(-size * epochs // 8)
    indices = list(sampler(size, global_batch_size=8, micro_batch_size=4, stop=steps))
    for epoch in range(epochs):
        assert Counter(indices[epoch * size : (epoch + 1) * size]) == Counter(range(size))


def test_seek_gives_the_same_samples_as_iterating() -> None:
    shape = {"global_batch_size": 6, "micro_batch_size": 3, "num_replicas": 2, "rank": 1, "stop": 50}
    walked, sought = sampler(17, **shape), sampler(17, **shape)
    sought.seek(40)
    assert list(sought) == list(walked)[40 * 3 :]
    assert len(sought) == len(list(sought)) == 30


def test_set_epoch_seeks_to_the_epochs_first_whole_step() -> None:
    it = sampler(10, global_batch_size=4, micro_batch_size=4, stop=20)
    it.set_epoch(3)
    assert it.start == 8  # positions 30 and on: step 8 begins at 32


def test_it_works_with_a_plain_dataloader() -> None:
    it = sampler(10, global_batch_size=4, micro_batch_size=2, num_replicas=2, rank=0, stop=5)
    assert isinstance(it, torch.utils.data.DistributedSampler)
    (batches,) = zip(*DataLoader(it.dataset, batch_size=2, sampler=it), strict=True)
    assert [batch.tolist() for batch in batches] == [m.indices.tolist() for m in it.micro_batches()]


def test_a_late_step_costs_as_much_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> int:
            return index

    far = DistributedSampler(Huge(), global_batch_size=8, micro_batch_size=8, start=10**6, stop=2 * 10**6)
    assert len(next(far.micro_batches()).indices) == 8
