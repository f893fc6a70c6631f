"""How a process uses the machine that it shares with its like: its cores, its memory, and when it collects garbage."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # to which glibc by itself goes up, by what is freed


def threads(processes: int) -> int:
    """For each of so many processes on this machine: its share of the physical cores that we may run on."""
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
