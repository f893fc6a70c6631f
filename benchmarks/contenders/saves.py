"""A contender's side of resuming.py: it reports its steps, saves when it is its turn, and ends."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from numbered import Numbered
from torch.utils.data.dataloader import _BaseDataLoaderIter
from turns import Line

EVERY = 2  # steps to a save


@dataclass(frozen=True)
class Part:
    """What a process has to do."""

    folder: Path  # of this contender's run, with its checkpoints
    saves: int
    step: int  # what the step after the last save is held to be; 0: what it is
    resumed: bool


class Made(NamedTuple):
    """A step, as one rank saw it."""

    at: float  # when it ended
    loss: float  # of this rank's part of the batch
    samples: list[int]  # the numbers of those


class Saves(Line):
    """Reports the first step, makes a number of saves, each in its turn, then reports one more step.

    It then ends the process, because a contender's shutdown is not measured.
    """

    begun = False  # a step was made in this process

    def __init__(self, work: Numbered, rank: int, part: Part) -> None:
        super().__init__(rank)
        self._work, self._rank, self._folder = work, rank, part.folder
        self._steps, self._last = 0, part.saves * EVERY + 1
        self._asked = 0.0

    def stepped(self) -> None:
        """Call this after each step."""
        Saves.begun = True
        self._steps += 1
        (loss, samples), self._work.latest = self._work.latest, None
        if self._steps in (1, self._last):
            now = time.time()
            self.wait(Made(now, loss.item(), samples.tolist()))
        if self._steps == self._last:
            os._exit(0)

    @property
    def due(self) -> bool:
        return self._steps % EVERY == 0

    def asked(self) -> None:
        """Call this when a save begins."""
        self._asked = time.perf_counter()

    def saved(self, complete: Callable[[], Any] = lambda: None) -> None:
        """Call this when the next step could begin. `complete` waits for work in the background.

        Reports how long the save took until then, and until the checkpoint was on disk.
        """
        stall = time.perf_counter() - self._asked
        complete()
        if self._rank == 0:  # or the system would write it while others have their turn
            for path in filter(Path.is_file, self._folder.rglob("*")):
                with path.open("rb") as file:
                    os.fsync(file)
        self.wait((stall, time.perf_counter() - self._asked))


def skip_reading(step: int) -> None:
    """Make the batch that a DataLoader reads after a save that of `step`. Its sampler is iterated up to there, but
    nothing is read. This gives what an uninterrupted run would read at that step. Reads before the first step, to
    look at the data, are unchanged."""
    plainly = _BaseDataLoaderIter._next_index

    def next_index(loader: Any) -> Any:
        loader.batches = getattr(loader, "batches", 0) + 1
        if Saves.begun and loader.batches == EVERY + 1:
            next(islice(loader._sampler_iter, step - EVERY, step - EVERY), None)
        return plainly(loader)

    _BaseDataLoaderIter._next_index = next_index
