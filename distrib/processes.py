"""No process is left behind: what the kernel can promise about parents and children."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(_worker_id: int = 0) -> None:
    """Have the kernel end this process when its parent ends, even by SIGKILL. Linux only.

    Serves as a DataLoader's `worker_init_fn` too.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be promised
            os._exit(1)
