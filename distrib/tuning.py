"""How a process uses the machine that it shares with its like: its cores, and when it collects garbage."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def threads(processes: int) -> int:
    """For each of so many processes on this machine: its share of the physical cores that we may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // processes)


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected after, not within: in a step all ranks would wait for the one that does."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
