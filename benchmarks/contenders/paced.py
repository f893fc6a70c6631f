"""A run's source of windows, with something else done between two steps."""

from collections.abc import Callable, Iterator
from typing import Any

from distrib import Trainer
from distrib.data.loader import DevicePrefetcher, Window
from distrib.data.source import Source

Pace = Callable[[Iterator[Window]], Iterator[Window]]


class Paced:
    """Stands in for a Source. `pace` gets its windows and yields them; what it does between two of them happens
    between two steps of Trainer's own loop."""

    def __init__(self, source: Source, pace: Pace) -> None:
        self._source, self._pace = source, pace

    def windows(self, start: int, prefetcher: DevicePrefetcher | None = None) -> Iterator[Window]:
        return self._pace(self._source.windows(start, prefetcher))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def paced(trainer: Trainer, pace: Pace) -> Trainer:
    """The trainer, with `pace` between its source and its loop."""
    trainer.source = Paced(trainer.source, pace)  # type: ignore[assignment]
    return trainer
