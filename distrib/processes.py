"""No process is left behind: what the kernel can promise about parents and children."""

import ctypes
import gc
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def shield_worker(_worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`."""
    shield()


def shield() -> None:
    """Leave signals to the rank, which may need this process to reach the end of a step and save; end when it ends.

    Collect garbage, which a rank that forks within a step has put off.
    """
    gc.enable()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def ignore_sigterm() -> None:
    """From now on, in the main thread: SIGTERM does nothing here."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be promised
            os._exit(1)
