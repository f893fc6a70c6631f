"""Seeds the generators that a user's code draws from: Python's `random`, numpy's legacy generator and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from distrib.data.order import derive_seed

# Each call into a task has a seed of its own, by its place here, so that none shifts another's draws. Add at the end.
_CALLS = ("task", "prepare", "train_dataset", "eval_dataset", "model", "optimizer", "metrics", "observers")
_MARK = 0x7A5C  # keeps these seeds apart from others that are derived from the config's seed


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the generators are as before, those of devices excepted."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def seeded(call: str, seed: int) -> Iterator[None]:
    """Run one of a task's calls with all generators seeded from the config's `seed`; afterwards they are as before.

    torch's generators get `seed` itself before `model`: initial weights are then those of earlier versions.
    """
    derived = derive_seed(seed, _MARK, _CALLS.index(call), 0)
    with random_state_kept():
        random.seed(derived)
        np.random.seed(derived % 2**32)
        torch.manual_seed(seed if call == "model" else derived)
        yield
