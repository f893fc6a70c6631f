"""A contender's side of peers.py: it makes its steps when it is its turn, and reports how long they took.

All contenders run at once, and all but one wait, block by block. So a slow moment of the machine affects them all.
"""

import cProfile
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client
from typing import Any, TypeVar

T = TypeVar("T")

ADDRESS = "DISTRIB_BENCHMARK_ADDRESS"
PROFILE = "DISTRIB_BENCHMARK_PROFILE"  # where set: the file for a profile of rank 0
CHECKED = 8  # steps whose losses are compared; the first of them ends the start-up


@dataclass(frozen=True)
class Length:
    blocks: int
    steps: int  # counted, a block

    @property
    def lead(self) -> int:
        """Uncounted steps at the start of each block, because the caches hold another contender's data."""
        return max(2, self.steps // 20)

    @property
    def total(self) -> int:
        return CHECKED + self.blocks * (self.lead + self.steps)


class Line:
    """A rank's connection to peers.py, which gives all ranks of a contender their turn at once."""

    def __init__(self, rank: int) -> None:
        self._connection = Client(os.environ[ADDRESS])
        self._connection.send(rank)

    def wait(self, value: Any) -> None:
        """Send `value`, and wait for our turn."""
        self._connection.send(value)
        self._connection.recv()


class Turns(Line):
    def __init__(self, length: Length, rank: int) -> None:
        super().__init__(rank)
        self.length = length
        self._steps = 0
        self._losses: list[float] = []
        self._began = 0.0
        self._profile = cProfile.Profile() if PROFILE in os.environ else None  # on all ranks: else the others wait
        self._is_rank_0 = rank == 0

    def stepped(self, loss: Callable[[], float]) -> None:
        """Call this after each step. `loss` returns the loss of this rank's part of the batch."""
        self._steps += 1
        place = (self._steps - CHECKED) % (self.length.lead + self.length.steps)
        if self._steps <= CHECKED:
            self._losses.append(loss())
            if self._steps == 1:
                self.wait(time.time())
            elif self._steps == CHECKED:
                self.wait(self._losses)
                if self._profile is not None:
                    self._profile.enable()
        elif place == self.length.lead:
            self._began = time.perf_counter()
        elif place == 0:
            self.wait((time.perf_counter() - self._began) / self.length.steps)

    @property
    def over(self) -> bool:
        return self._steps >= self.length.total

    def finish(self, evaluate: Callable[[], float]) -> None:
        """Report the peak memory after the last step, and time and result of evaluating the whole set."""
        if self._profile is not None:
            self._profile.disable()
            if self._is_rank_0:
                self._profile.dump_stats(os.environ[PROFILE])
        self.wait(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        evaluate()
        self.wait(None)
        began = time.perf_counter()
        loss = evaluate()
        self.wait((time.perf_counter() - began, loss))
