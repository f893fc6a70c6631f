"""Reads what a run folder records about earlier starts of its run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from distrib.config import Config
from distrib.errors import DistribError
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVENT
from distrib.run_folder.ledger import now


@contextmanager
def where_it_began(run: RunDir) -> Iterator[None]:
    """Change to the directory that the run was last started in, if it exists, and back on exit.

    The task's module and its files are found from there. `run` must have an absolute path.
    """
    here = os.getcwd()
    with suppress(DistribError, OSError, LookupError, TypeError):  # older versions did not record the directory
        os.chdir(run.starts()[-1]["directory"])
    try:
        yield
    finally:
        os.chdir(here)


def total_seconds(run: RunDir) -> float:
    """Return the seconds that all starts of the run have taken so far. A killed start counts up to its last event."""
    starts: list[tuple[datetime, datetime]] = []
    for event in read_lines(run.events, EVENT, []):  # damaged lines are skipped
        try:
            at = datetime.fromisoformat(event.get("time", ""))
        except ValueError:
            continue
        if event["event"] == "started":
            starts.append((at, at))
        elif starts:
            starts[-1] = starts[-1][0], at
    if starts:
        starts[-1] = starts[-1][0], datetime.fromisoformat(now())
    return sum((last - first).total_seconds() for first, last in starts)


def what_to_do_now(run: RunDir, config: Config) -> str:
    """Return advice for a run that has already finished. It names the keys that `config` changes without effect."""
    try:
        before, given = run.read_config().flat(), config.flat()
    except DistribError:  # the folder may not exist on this rank's machine
        before = given = {}
    changes = [f"{key} was {before.get(key)!r}, is {given[key]!r}" for key in given if given[key] != before.get(key)]
    no_effect = f"what has changed in the config had no effect ({'; '.join(changes)}); " if changes else ""
    return f"{no_effect}to train again, remove the folder or choose --run-dir"
