"""Real DataLoaders, with and without worker processes."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from distrib.data.loader import DevicePrefetcher, train_windows
from distrib.data.order import digest
from distrib.data.sampler import DistributedSampler


class Augmented(Dataset[Any]):
    """Returns each sample with random numbers of Python, numpy and torch."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), float(np.random.rand()), random.random()


class Whole(Augmented):
    """Reads whole batches with __getitems__, which returns a dict."""

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(indices)}


class Listed(Augmented):
    """Reads whole batches with __getitems__, which returns a list of samples, as torch's Subset does."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        return [(index, -index) for index in indices]


def windows(dataset: Dataset[Any], world_size: int = 1, rank: int = 0, start: int = 0, **loading: int) -> list[Any]:
    sampler = DistributedSampler(
        dataset,
        global_batch_size=4,
        micro_batch_size=2,
        num_replicas=world_size,
        rank=rank,
        seed=5,
        start=start,
        stop=6,
    )
    return [(window, list(window)) for window in train_windows(sampler, **loading)]


def flat(read: list[Any]) -> list[Any]:
    return [torch.stack([column.double() for column in batch]).tolist() for _, batches in read for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_depend_only_on_epoch_and_sample(num_workers: int) -> None:
    """With one process or two, with or without workers, from the start or from a later step."""
    alone = flat(windows(Augmented()))
    assert flat(windows(Augmented(), num_workers=num_workers)) == alone
    assert flat(windows(Augmented(), start=3, num_workers=num_workers)) == alone[6:]
    ranks = [flat(windows(Augmented(), world_size=2, rank=rank, num_workers=num_workers)) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone
    first, again = alone[0][1], alone[5][1]
    assert first != again  # the next epoch augments differently


def test_workers_change_neither_samples_nor_the_models_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    list(windows(TensorDataset(torch.arange(10)), num_workers=1))
    assert torch.equal(torch.rand(4), expected)


def test_a_dataset_with_getitems_reads_whole_batches() -> None:
    indices = [batch[0].tolist() for _, batches in windows(Augmented()) for batch in batches]
    whole = [batch["index"].tolist() for _, batches in windows(Whole()) for batch in batches]
    listed = [batch for _, batches in windows(Listed()) for batch in batches]
    tensors = [batch[0].tolist() for _, batches in windows(TensorDataset(torch.arange(10))) for batch in batches]
    assert whole == indices == tensors == [batch[0].tolist() for batch in listed]
    assert all(torch.equal(batch[0], -batch[1]) for batch in listed)


def test_the_windows_digest_matches_the_samples_read() -> None:
    ranks = [windows(Augmented(), world_size=2, rank=rank) for rank in (0, 1)]
    for (alone, _), (first, _), (second, _) in zip(windows(Augmented()), *ranks, strict=True):
        assert (first.digest + second.digest) % 2**64 == alone.digest
    window, batches = ranks[1][2]
    indices = torch.cat([batch[0] for batch in batches]).numpy().astype(np.uint64)
    assert digest(np.arange(10, 12, dtype=np.uint64), indices) == window.digest  # step 2, second half


def test_the_prefetcher_keeps_the_order() -> None:
    """The prefetcher yields each sample once, in the order read."""
    dataset = TensorDataset(torch.arange(10))
    options = {"global_batch_size": 4, "micro_batch_size": 2, "stop": 7}
    copies: list[int] = []

    def copy(batch: Any) -> Any:
        copies.append(len(copies))
        return [tensor + 100 for tensor in batch]

    found = {}
    for prefetcher in (None, DevicePrefetcher(torch.device("cpu"), copy)):
        windows = list(train_windows(DistributedSampler(dataset, **options), prefetcher))
        found[prefetcher] = [([batch[0].tolist() for batch in window], window.digest) for window in windows]
        assert len(found[prefetcher]) == 7
    plain, copied = found.values()
    assert [digest for _, digest in copied] == [digest for _, digest in plain]
    assert [samples for samples, _ in copied] == [[[s + 100 for s in b] for b in window] for window, _ in plain]
    assert len(copies) == 14
