"""A contender's side of resuming.py: it says what its steps came to, saves when it is its turn, and ends."""

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
    """What a process is started for."""

    folder: Path  # of this contender's run, with its checkpoints
    saves: int
    step: int  # what the step after the last save is held to be; 0: what it is
    resumed: bool


class Made(NamedTuple):
    """A step, as a rank saw it."""

    at: float  # when it ended
    loss: float  # of this rank's part of the batch
    samples: list[int]  # the numbers of those


class Saves(Line):
    """Says the first step, makes so many saves, each when it is our turn, then one more step, which it says too.

    After that it ends the process: how a contender ends is not measured.
    """

    begun = False  # a step was made in this process

    def __init__(self, work: Numbered, rank: int, part: Part) -> None:
        super().__init__(rank)
        self._work, self._rank, self._folder = work, rank, part.folder
        self._steps, self._last = 0, part.saves * EVERY + 1
        self._asked = 0.0

    def stepped(self) -> None:
        """To be called after each step."""
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
        """To be called where a save begins."""
        self._asked = time.perf_counter()

    def saved(self, complete: Callable[[], Any] = lambda: None) -> None:
        """To be called where the next step could begin; `complete` waits for what goes on in the background.

        Says after how long that was, and after how long the checkpoint had reached the disk.
        """
        stall = time.perf_counter() - self._asked
        complete()
        if self._rank == 0:  # or the system would write it while others have their turn
            for path in filter(Path.is_file, self._folder.rglob("*")):
                with path.open("rb") as file:
                    os.fsync(file)
        self.wait((stall, time.perf_counter() - self._asked))


def skip_reading(step: int) -> None:
    """From here on, the batch that a DataLoader reads after a save is that of `step`: its own sampler is gone through
    until there, but nothing is read. So one sees what an uninterrupted run would read at that step. What is read before
    the first step, to look at the data, is left alone."""
    plainly = _BaseDataLoaderIter._next_index

    def next_index(loader: Any) -> Any:
        loader.batches = getattr(loader, "batches", 0) + 1
        if Saves.begun and loader.batches == EVERY + 1:
            next(islice(loader._sampler_iter, step - EVERY, step - EVERY), None)
        return plainly(loader)

    _BaseDataLoaderIter._next_index = next_index
