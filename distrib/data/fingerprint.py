"""The fingerprint of a dataset: its length, and a short print of some samples at fixed indices.

Ranks, and later starts of a run, compare fingerprints, so changed data are noticed before the first step. Bytes,
strings and integers are compared exactly. Floating-point numbers and pixels are compared by three statistics within a
tolerance, because their last bits depend on the number of threads, on the CPU and on library versions.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from distrib.data.loader import Read, SampleReader, batch_loader
from distrib.data.prints import TOLERANCES, UNKNOWN, VARIES, Fingerprint, Print, same
from distrib.data.sampler import MicroBatch
from distrib.data.shards import FirstSamples, ShardedStream

_SAMPLES = 8  # of each dataset, each read twice


def fingerprint(dataset: Dataset[Any] | None, seed: int, num_workers: int = 0) -> Fingerprint | None:
    """Read some samples as training does, with the random numbers of epoch 0, and return their fingerprint.

    The samples of a ShardedStream are the first ones of its shards. Returns None for another stream, or no dataset. If
    `num_workers` is more than 0, one worker process reads, so that workers that are started later do not inherit a file
    that the dataset has opened.
    """
    if isinstance(dataset, ShardedStream):
        found = fingerprint(FirstSamples(dataset), seed, num_workers)
        return None if found is None else {**found, "order": {"by": "shards", "count": found["length"]}}
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        return {"length": 0, "samples": {}}
    places = sorted({place * (size - 1) // (_SAMPLES - 1) for place in range(_SAMPLES)})
    alone = [MicroBatch(*[np.array([place], dtype=np.uint64)] * 2) for place in places]
    prints = [read.batch for read in batch_loader(_PrintReader(dataset, seed), alone * 2, min(1, num_workers))]
    samples = {
        str(place): first if same(first, second) else VARIES
        for place, first, second in zip(places, prints[: len(places)], prints[len(places) :], strict=True)
    }
    return {"length": size, "samples": samples}


class _PrintReader(SampleReader):
    """Reads samples as training does, and returns their prints instead of batches."""

    def __getitems__(self, micro_batch: MicroBatch) -> Read:
        try:
            return Read(micro_batch, sample_print(super().__getitems__(micro_batch).batch))
        except Exception:
            return self._uncollated(micro_batch)

    def _uncollated(self, micro_batch: MicroBatch) -> Read:
        """Read a sample that only the task's collate takes. Its print does not depend on what collate does."""
        try:
            found: Print = sample_print(SampleReader(self.dataset, self.seed, list).__getitems__(micro_batch).batch)
        except Exception:  # training reports a sample that cannot be read, if it ever reaches it
            found = UNKNOWN
        return Read(micro_batch, found)


def sample_print(sample: Any) -> Print:
    """Return the print of a nested sample of tensors, arrays, numbers, strings and bytes.

    Raises TypeError for anything else.
    """
    exact, numbers = hashlib.sha256(), _Tolerant()
    _add(sample, exact, numbers)
    return {"exact": exact.hexdigest()[:16], **numbers.statistics()}


class _Tolerant:
    """The numbers of a sample that are compared within a tolerance."""

    def __init__(self) -> None:
        self.parts: dict[str, list[npt.NDArray[np.float64]]] = {kind: [] for kind in TOLERANCES}

    def statistics(self) -> dict[str, list[float]]:
        return {kind: _statistics(np.concatenate(parts)) if parts else [0.0] for kind, parts in self.parts.items()}


def _statistics(values: npt.NDArray[np.float64]) -> list[float]:
    """Return the largest magnitude, and relative to it the root mean square and a weighted sum that depends on the
    order of the values."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return [0.0, 0.0, 0.0]
    relative = values / largest
    weights = np.cos(np.arange(len(values), dtype=np.float64))
    norm = math.sqrt(float(relative @ relative))
    projection = float(weights @ relative) / norm
    return [float(f"{figure:.9g}") for figure in (largest, norm / math.sqrt(len(values)), projection)]


def _add(value: Any, exact: Any, numbers: _Tolerant) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().resolve_conj()
        exact.update(f"tensor {tensor.dtype} ".encode())
        coarse = tensor.dtype in (torch.float16, torch.bfloat16)
        _add_array((tensor.float() if coarse else tensor).numpy(), exact, numbers, coarse)
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        exact.update(f"array {array.dtype.str} ".encode())
        _add_array(array, exact, numbers, array.dtype == np.float16)
    elif value is None or isinstance(value, bool | int | str | bytes):
        exact.update(f"{type(value).__name__} {value!r} ".encode())
    elif isinstance(value, float):
        _add_array(np.float64(value), exact, numbers)
    elif isinstance(value, Mapping):
        exact.update(f"mapping {len(value)} ".encode())
        for key, item in value.items():
            exact.update(f"{key!r}: ".encode())
            _add(item, exact, numbers)
    elif isinstance(value, list | tuple):
        exact.update(f"list {len(value)} ".encode())
        for item in value:
            _add(item, exact, numbers)
    else:
        raise TypeError(f"no print of a {type(value).__name__}")


def _add_array(array: Any, exact: Any, numbers: _Tolerant, coarse: bool = False) -> None:
    exact.update(f"{array.shape} ".encode())
    if array.dtype.kind == "O":
        _add(array.tolist(), exact, numbers)
    elif array.dtype.kind in "fc" or array.dtype == np.uint8:
        values = np.ascontiguousarray(array).reshape(-1)
        flat = (values.view(values.real.dtype) if array.dtype.kind == "c" else values).astype(np.float64)
        finite = np.isfinite(flat)
        exact.update(np.packbits(finite).tobytes())
        numbers.parts["coarse" if coarse or array.dtype == np.uint8 else "float"].append(np.where(finite, flat, 0.0))
    else:
        exact.update(np.ascontiguousarray(array).tobytes())
