"""Tunes a process that shares a machine with other ranks: threads, malloc, scheduling, and garbage collection."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the largest value to which glibc itself raises the threshold


def threads(processes: int) -> int:
    """Return the number of threads for each of `processes` processes: its share of the usable physical cores."""
    import psutil  # imported late, because `distrib --help` imports this file

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // processes)


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the OS after each step; the next step allocates the same sizes.

    Otherwise each step would get the end of the heap again page by page. This holds for CPU tensors below 32 MB; glibc
    still returns larger ones. If the user has set an option of malloc, nothing is changed.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def run_as_batch() -> None:
    """Use SCHED_BATCH (sched(7)), so that this thread and those it starts do not preempt each other when they wake.

    Otherwise gloo's network thread may preempt the thread that is sending, and then spin for a lock that this thread
    holds (gloo/transport/tcp/pair.cc, `handleEvents`) until the scheduler's next tick: 4 ms, while a step may take 1
    ms. If the user has chosen a policy (chrt), nothing is changed.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):  # a sandbox may forbid it; then steps are only slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def no_collection() -> Iterator[None]:
    """Disable garbage collection in the body, for imports: what they make stays."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
