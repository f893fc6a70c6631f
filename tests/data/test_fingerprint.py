"""The fingerprint of a dataset: changes that it must detect, and differences that it must tolerate."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distrib.data.fingerprint import fingerprint, sample_print
from distrib.data.prints import VARIES, same
from distrib.run_folder.identity import difference

SAMPLES = {
    "tensors": lambda: (torch.arange(6).reshape(2, 3), torch.tensor(3)),
    "bf16": lambda: torch.linspace(-1, 1, 50, dtype=torch.bfloat16),
    "complex": lambda: torch.linspace(-1, 1, 8).to(torch.complex64) * 1j,
    "numpy": lambda: np.linspace(0, 5, 7, dtype=np.float32),
    "pixels": lambda: np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
    "words": lambda: {"text": "a sentence", "raw": b"bytes", "label": 3, "none": None, "scores": [0.5, float("nan")]},
    "objects": lambda: np.array(["a", 3], dtype=object),
}


def changed(sample: Any) -> Any:
    """Return the sample with one entry replaced."""
    if isinstance(sample, tuple):
        return (changed(sample[0]), *sample[1:])
    if isinstance(sample, dict):
        return {**sample, "text": "another sentence"}
    copy = sample.clone() if isinstance(sample, torch.Tensor) else sample.copy()
    copy.reshape(-1)[2 % len(copy)] = 1.5 if copy.dtype != np.uint8 else 200
    return copy


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_print_changes_with_the_content(kind: str) -> None:
    found = sample_print(SAMPLES[kind]())
    assert found == sample_print(SAMPLES[kind]())
    assert same(found, json.loads(json.dumps(found)))
    assert not same(found, sample_print(changed(SAMPLES[kind]())))


@given(st.lists(st.floats(allow_nan=True, width=32), max_size=40), st.integers(0, 2**32))
def test_prints_tolerate_rounding(values: list[float], seed: int) -> None:
    """Another number of threads sums in another order. Here each number is off by some units in the last place."""
    array = np.array(values, dtype=np.float32)
    away = np.random.default_rng(seed).integers(-3, 4, len(array)).astype(np.float32)
    limit = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        other = np.where(np.abs(array) < limit / 2, array * (1 + away * np.finfo(np.float32).eps), array)
    assert same(sample_print(array), sample_print(other.astype(np.float32)))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=20, unique=True), st.data())
def test_a_print_changes_with_the_order_of_values(values: list[float], data: st.DataObject) -> None:
    first, second = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    swapped = list(values)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    scale = max(map(abs, values))
    if abs(values[first] - values[second]) > 0.1 * scale and scale > 1e-30:
        assert not same(sample_print(torch.tensor(values)), sample_print(torch.tensor(swapped)))


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), np.random.rand(3), torch.rand(2)


class OwnGenerator(Augmented):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return index, self.generator.integers(2**40)


class Strange(Augmented):
    def __getitem__(self, index: int) -> Any:
        raise OSError("no such file")


class Opened(Augmented):
    """Appends to a file which process reads, and keeps it open, as datasets over HDF5 do."""

    def __init__(self, readers: Path) -> None:
        self.readers, self.file = readers, None

    def __getitem__(self, index: int) -> Any:
        self.file = self.file or self.readers.open("a")
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()
        return torch.tensor(index)


def test_a_fingerprint_reads_samples_with_the_seeds_of_training() -> None:
    first, second = (fingerprint(Augmented(), seed=1) for _ in range(2))
    assert difference(first, second, "before") is None
    assert difference(fingerprint(Augmented(), seed=2), first, "before") is not None, "they are in the print"


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_vary_or_cannot_be_read_are_not_compared(workers: int) -> None:
    found = fingerprint(OwnGenerator(), 0, workers)
    assert found is not None
    assert set(found["samples"].values()) == {VARIES}
    assert difference(found, fingerprint(Augmented(), 0), "before") is None
    assert difference(fingerprint(Strange(), 0, workers), fingerprint(Augmented(), 0), "before") is None


def test_a_difference_names_the_dataset_and_the_sample() -> None:
    numbers = torch.arange(455)
    before = fingerprint(TensorDataset(numbers), 0)
    assert (
        difference(fingerprint(TensorDataset(numbers[:399]), 0), before, "then") == "has 399 samples, not 455 as then"
    )
    last = torch.where(numbers == 454, 0, numbers)
    assert difference(fingerprint(TensorDataset(last), 0), before, "then") == "has another sample 454 than then"
    assert difference(fingerprint(TensorDataset(numbers), 0), None, "then") is None, "an older version's run"


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
def test_most_samples_of_a_small_set_are_read(size: int) -> None:
    found = fingerprint(TensorDataset(torch.arange(size)), 0)
    assert found is not None
    assert {"0", str(size - 1)} <= found["samples"].keys()
    assert len(found["samples"]) == min(size, 8)


def test_a_stream_has_no_fingerprint() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("a stream gives each sample once")

    assert fingerprint(Stream(), 0) is None
    assert fingerprint(None, 0) is None


def test_a_worker_process_reads_the_samples(tmp_path: Path) -> None:
    dataset = Opened(tmp_path / "readers")
    fingerprint(dataset, 0, 2)
    readers = set((tmp_path / "readers").read_text().split())
    assert len(readers) == 1
    assert str(os.getpid()) not in readers
    assert dataset.file is None
