"""Calls the observers of a run, and keeps the run safe from them."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

from distrib.data.seeding import random_state_kept
from distrib.errors import TrainingError
from distrib.monitor.observer import METHODS, Observer, pass_on
from distrib.run_folder.ledger import finite
from distrib.tracebacks import first_line, place


class Notifier:
    """Passes each line to every observer. One that raises an exception is called no more."""

    def __init__(self, display: Observer, others: Sequence[Observer]) -> None:
        """`display`: our own; it comes first, and draws no random numbers."""
        self._display = display
        self._observers = [display, *others]

    @property
    def has_others(self) -> bool:
        """Is one of them the user's?"""
        return any(observer is not self._display for observer in self._observers)

    def notify(self, kind: str, line: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Pass a copy of the line to each, then call `warn` for each that failed.

        Raises TrainingError if one calls sys.exit before the run has ended. KeyboardInterrupt is raised on.
        """
        method, problems = METHODS.get(kind, "on_event"), []
        try:
            for observer in self._observers:
                if getattr(type(observer), method) is getattr(Observer, method):
                    continue  # it does nothing
                try:
                    self._call(observer, kind, finite(line))
                except (Exception, SystemExit) as error:
                    self._observers = [other for other in self._observers if other is not observer]
                    name = f"{type(observer).__module__}:{type(observer).__qualname__}"
                    what = f"{first_line(error)}{_line(error)}"
                    if isinstance(error, SystemExit) and method != "on_end":
                        raise TrainingError(
                            f"observer {name} asked to exit in {method}: {what}; an observer cannot end a run, take "
                            "sys.exit out of it"
                        ) from error
                    problems.append(f"observer {name} failed in {method} and is called no more: {what}")
        finally:
            for problem in problems:
                warn(problem)

    def _call(self, observer: Observer, kind: str, line: dict[str, Any]) -> None:
        if observer is self._display:
            pass_on(observer, kind, line)
            return
        with random_state_kept():
            pass_on(observer, kind, line)


def _line(error: BaseException) -> str:
    """` at FILE:LINE`, the user's own if there is one in the traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return place(error) or f" at {last.filename}:{last.lineno}"
