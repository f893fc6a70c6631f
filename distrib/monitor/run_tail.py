"""Reads a run folder as it grows: each line once, in the order in which it was written."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from distrib.errors import DamagedFileError
from distrib.run_folder.files import Unreadable, open_regular, parse
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION, EVENT, STEP

_AT_A_TIME = 10_000  # steps kept in memory


class News(NamedTuple):
    """A line. `kind`: step for steps.jsonl, evaluation for evals.jsonl, the event's name for events.jsonl."""

    kind: str
    entry: dict[str, Any]


class RunTail:
    """Follows one run folder. Each call of `entries` continues where the last one ended."""

    def __init__(self, run: RunDir) -> None:
        self._steps = _Lines(run.steps, STEP)
        self._evals = _Lines(run.evals, EVALUATION)
        self._events = _Lines(run.events, EVENT)
        self._steps_done = 0

    def entries(self) -> Iterator[News]:
        """Yield the lines since the last call. An evaluation or event follows the steps that were done before it.

        Steps are read first, because lines that belong before a step are written before it. A line that belongs after
        a step which is not read yet waits for it.
        """
        more = True
        while more:
            again, more = self._steps.read(_AT_A_TIME)
            if again:
                self._steps_done = 0
            self._evals.read()
            self._events.read()
            for step in self._steps.take():
                yield from self._others(self._steps_done)
                self._steps_done = step["step"] + 1
                yield News("step", step)
            yield from self._others(self._steps_done)

    def trouble(self) -> list[str]:
        """Return one message for each file with lines that could not be read and were left out."""
        return [line for lines in (self._steps, self._evals, self._events) for line in lines.trouble()]

    def rest(self) -> Iterator[News]:
        """Yield the lines that wait for a step, when no more steps will come."""
        yield from self._others(math.inf)

    def _others(self, steps_done: float) -> Iterator[News]:
        for evaluation in self._evals.take(steps_done):
            yield News("evaluation", evaluation)
        for event in self._events.take(steps_done):
            yield News(event["event"], event)


class _Lines:
    """The lines of a JSON-lines file that grows, and is cut back when the run is resumed."""

    def __init__(self, path: Path, form: TypeAdapter[dict[str, Any]]) -> None:
        self.path, self.form = path, form
        self._number = 0  # lines read
        self._unreadable = Unreadable(path)
        self._unusable: str | None = None
        self._read_to = 0
        self._last = b""
        self._waiting: list[dict[str, Any]] = []
        self._over = 0  # the first so many are from an earlier start: their steps may have been cut off

    def read(self, at_most: int = sys.maxsize) -> tuple[bool, bool]:
        """Read new whole lines, at most so many; all lines again if the file was cut back. Return whether it was cut
        back, and whether there may be more."""
        again, number = False, 0
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return again, False
        except DamagedFileError as error:
            self._unusable = str(error)
            return again, False
        with file:
            file.seek(self._read_to - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._read_to, self._last = file.seek(0), b""
                self._waiting.clear()
                again = True
                self._over, self._number, self._unreadable = 0, 0, Unreadable(self.path)
            for line in file:
                if number == at_most or not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                self._last = line
                self._number += 1
                number += 1
                try:
                    entry = parse(line, self.form, self.path)
                except DamagedFileError:
                    self._unreadable.add(self._number)
                    continue
                if entry.get("event") == "started":
                    self._over = len(self._waiting)
                self._waiting.append(entry)
        return again, number == at_most

    def trouble(self) -> list[str]:
        """Return what cannot be read, in at most one message."""
        return [self._unusable] if self._unusable else self._unreadable.said()

    def take(self, up_to: float = math.inf) -> Iterator[dict[str, Any]]:
        """Yield waiting lines of the first `up_to` steps, in the order of the file. `resumed` does not wait."""
        number = 0
        while number < len(self._waiting) and (
            number < self._over
            or self._waiting[number].get("step", 0) <= up_to
            or self._waiting[number].get("event") == "resumed"
        ):
            number += 1
        taken, self._waiting = self._waiting[:number], self._waiting[number:]
        self._over = max(0, self._over - number)
        yield from taken
