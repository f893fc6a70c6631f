"""How a process uses the machine that it shares with its like: cores, memory, and when it collects garbage."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER, _LARGEST = -1, 1 << 30  # bytes


def threads(processes: int) -> int:
    """For each of so many processes on this machine: its share of the physical cores that we may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // processes)


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is allocated next, where it is glibc's.

    As it comes it gives a large tensor's memory back to the kernel at once, and the next step gets it page by page
    again, each filled with zeros: 1 to 2 % of a step of the GPT in benchmarks/, for nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


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
