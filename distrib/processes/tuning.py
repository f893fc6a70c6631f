"""How a process uses the machine that it shares with its like: its cores and memory, and when it collects garbage."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # to which glibc by itself goes up, by what is freed


def threads(processes: int) -> int:
    """For each of so many processes on this machine: its share of the physical cores that we may run on."""
    import psutil  # not by every command: `distrib --help` needs this file too

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // processes)


def keep_freed_memory() -> None:
    """Have malloc keep what a step frees, of which the next makes the same again: on a CPU, tensors lie in it.

    glibc alone gives the end of its heap back as soon as a step is over, to be given it anew, page by page, in the next
    one. Tensors from 32 MB on it goes on to give back. Where the user has set it, it stays as it was set.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def run_as_batch() -> None:
    """Have this thread, and those that it starts from now on, wait for a core rather than take it from one another:
    SCHED_BATCH, see sched(7). Where the user has chosen a policy (chrt), it stays.

    gloo's thread for the network, when it wakes, may take the core from the thread that is sending. That one holds the
    lock which the other then spins for (gloo/transport/tcp/pair.cc, `handleEvents`), without an end until the
    scheduler looks again: 4 ms, where the whole step takes one.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):  # a sandbox that forbids it costs time, nothing else
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


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
