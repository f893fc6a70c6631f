"""What a run writes into its folder, as it comes, in the order in which it happened: for those who look on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distrib.state.run_dir import RunDir

_AT_A_TIME = 10_000  # steps that are kept in memory


class News(NamedTuple):
    """A line of steps.jsonl (`step`), of evals.jsonl (`evaluation`), or of events.jsonl (the event's name)."""

    kind: str
    entry: dict[str, Any]


class Follower:
    """Reads on in a run's folder each time it is asked."""

    def __init__(self, run: RunDir) -> None:
        self._steps, self._evals, self._events = (_Lines(path) for path in (run.steps, run.evals, run.events))
        self._steps_done = 0

    def news(self) -> Iterator[News]:
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
                yield from self._others()
                self._steps_done = step["step"] + 1
                yield News("step", step)
            yield from self._others()

    def _others(self) -> Iterator[News]:
        for evaluation in self._evals.take(self._steps_done):
            yield News("evaluation", evaluation)
        for event in self._events.take(self._steps_done):
            yield News(event["event"], event)


class _Lines:
    """The lines of a JSON-lines file that grows, and is cut back where the run is resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0
        self._last = b""
        self._waiting: list[dict[str, Any]] = []
        self._over = 0  # how many of those are of a start that was followed by another: their steps may be cut off

    def read(self, at_most: int = sys.maxsize) -> tuple[bool, bool]:
        """Whole lines; once more from the beginning where what was read last is no longer there: did that happen? And
        may there be more?"""
        again, number = False, 0
        if not self.path.exists():
            return again, False
        with self.path.open("rb") as file:
            file.seek(self._read_to - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._read_to, self._last = file.seek(0), b""
                self._waiting.clear()
                again = True
                self._over = 0
            for line in file:
                if number == at_most or not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                self._last = line
                if b'"event":"started"' in line:
                    self._over = len(self._waiting)
                self._waiting.append(json.loads(line))
                number += 1
        return again, number == at_most

    def take(self, up_to: float = float("inf")) -> Iterator[dict[str, Any]]:
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
