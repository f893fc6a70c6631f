"""Seeds the random generators that user code draws from: Python's `random`, numpy's legacy generator and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from distrib.data.order import derive_seed

# Each kind of call has its own seed, derived from its index here, so no call shifts the draws of another. Append only.
_CALLS = (
    *("task", "prepare", "train_dataset", "eval_dataset", "model", "optimizer", "metrics", "observers"),
    *("samples", "sample_weights"),
)
_MARK = 0x7A5C  # separates these seeds from others that are derived from the config's seed


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the generators of Python, numpy and the CPU on exit. Those of devices are not restored."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def seeded(call: str, seed: int) -> Iterator[None]:
    """Seed all generators for one of a task's calls, from the config's `seed`, and restore them on exit.

    For `model`, torch's generators get `seed` itself, so that initial weights are the same as in earlier versions.
    """
    derived = derive_seed(seed, _MARK, _CALLS.index(call), 0)
    with random_state_kept():
        random.seed(derived)
        np.random.seed(derived % 2**32)
        torch.manual_seed(seed if call == "model" else derived)
        yield
