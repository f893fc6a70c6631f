"""Ties the lifetimes of parent and child processes together, so that no process is left behind."""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

LAUNCHER = "DISTRIB_LAUNCHER_PID"  # the process id of distrib launch, for the ranks that it starts
# Signals with which terminals, users and clusters ask a process to end.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_workers: "list[BaseProcess]" = []  # that this process has started


def shield_worker(_worker_id: int) -> None:
    """Shield a DataLoader's worker. For use as `worker_init_fn`."""
    shield()
    from multiprocessing import parent_process  # loaded already in a worker; slow to import in other processes

    rank = parent_process()
    if rank is not None and not rank.is_alive():  # it ended before die_with_parent took effect
        os._exit(1)


def shield(parent: int | None = None) -> None:
    """Ignore stop signals in this helper process, and end when its rank ends.

    The rank handles the signals, and may need this process until it has finished the step and saved. Garbage collection
    is enabled again, in case the rank had disabled it when it forked.
    """
    gc.enable()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    die_with_parent(parent)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Block stop signals, while starting processes that call `shield`. It unblocks them when they are ignored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start DataLoader workers that call `shield_worker`. At its end this process kills those that are left.

    A worker is left if something still refers to the iterator of its loader, for example the traceback of an exception
    that is kept. multiprocessing would send it SIGTERM, which it ignores, and wait for it for ever.
    """
    from multiprocessing import active_children  # slow to import

    before = active_children()
    with stop_signals_held():
        yield
    _workers.extend(child for child in active_children() if child not in before)
    atexit.unregister(_kill_workers)
    atexit.register(
        _kill_workers, os.getpid()
    )  # after multiprocessing has registered its own, so that this comes first


def _kill_workers(parent: int) -> None:
    for worker in _workers if os.getpid() == parent else ():
        if worker.is_alive():
            worker.kill()


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, if called in the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, even by SIGKILL (prctl PR_SET_PDEATHSIG). Linux only.

    `parent`: the parent's process id, if known. Then this process also ends if the parent ended before this call.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def die_with_launcher() -> None:
    """End this process with its launcher, if distrib launch, torchrun or accelerate launch started it.

    A rank calls this before it imports torch, which takes seconds, so that it never outlives a killed launcher. Under
    distrib launch, SIGINT then ends it at once and without a traceback, until it handles signals.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # not valid for child processes
    if launcher is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if launcher is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(None if launcher is None else int(launcher))
