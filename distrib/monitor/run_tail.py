"""What a run writes into its folder, as it comes, in the order in which it happened: for those who look on."""

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

_AT_A_TIME = 10_000  # steps that are kept in memory


class News(NamedTuple):
    """A line of steps.jsonl (`step`), of evals.jsonl (`evaluation`), or of events.jsonl (the event's name)."""

    kind: str
    entry: dict[str, Any]


class RunTail:
    """Reads on in a run's folder each time it is asked."""

    def __init__(self, run: RunDir) -> None:
        self._steps = _Lines(run.steps, STEP)
        self._evals = _Lines(run.evals, EVALUATION)
        self._events = _Lines(run.events, EVENT)
        self._steps_done = 0

    def entries(self) -> Iterator[News]:
        """What came since the last call. An evaluation comes between the steps where it was made; an event after the
        steps that were done then.

        Steps are read first: what belongs before a step is written before it. What is found to come after one that is
        not read yet, waits.
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
        """What could not be read, and was left out: a line for each file."""
        return [line for lines in (self._steps, self._evals, self._events) for line in lines.trouble()]

    def rest(self) -> Iterator[News]:
        """What waits for a step that will not come: its line is lost, or the run has ended."""
        yield from self._others(math.inf)

    def _others(self, steps_done: float) -> Iterator[News]:
        for evaluation in self._evals.take(steps_done):
            yield News("evaluation", evaluation)
        for event in self._events.take(steps_done):
            yield News(event["event"], event)


class _Lines:
    """The lines of a JSON-lines file that grows, and is cut back where the run is resumed."""

    def __init__(self, path: Path, form: TypeAdapter[dict[str, Any]]) -> None:
        self.path, self.form = path, form
        self._number = 0  # of lines read
        self._unreadable = Unreadable(path)
        self._unusable: str | None = None
        self._read_to = 0
        self._last = b""
        self._waiting: list[dict[str, Any]] = []
        self._over = 0  # how many of those are of a start that was followed by another: their steps may be cut off

    def read(self, at_most: int = sys.maxsize) -> tuple[bool, bool]:
        """Whole lines; once more from the beginning where what was read last is no longer there: did that happen? And
        may there be more?"""
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
        """What cannot be read, in at most one line."""
        return [self._unusable] if self._unusable else self._unreadable.said()

    def take(self, up_to: float = math.inf) -> Iterator[dict[str, Any]]:
        """Those of steps, or after so many steps, in the order of the file; that a run goes on comes at once."""
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
