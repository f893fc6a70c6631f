"""No process is left behind: what the kernel can promise about parents and children."""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHER = "DISTRIB_LAUNCHER_PID"  # the process number of distrib launch, for the ranks that it starts
# What terminals, users and clusters send to a process that shall end.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def shield_worker(_worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`."""
    shield()
    from multiprocessing import parent_process  # loaded long since; elsewhere it would take its time

    rank = parent_process()
    if rank is not None and not rank.is_alive():  # it ended before it could be promised
        os._exit(1)


def shield(parent: int | None = None) -> None:
    """Leave signals to the rank, which may need this process to reach the end of a step and save; end when it ends.

    Collect garbage, which a rank that forks within a step has put off.
    """
    gc.enable()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    die_with_parent(parent)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Start processes within that call `shield`: until then no signal that is sent to all processes ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_sigterm() -> None:
    """From now on, in the main thread: SIGTERM does nothing here."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel end this process when its parent ends, even by SIGKILL. Linux only.

    `parent`: its process number, if it is known; then this process ends too if its parent ended before this call.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def die_with_launcher() -> None:
    """End with distrib launch, torchrun or accelerate launch, if one of them started this process.

    A rank does this first, before it imports torch for a second or more: until then nobody would end it.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # what this process starts has another parent
    if launcher is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(None if launcher is None else int(launcher))
