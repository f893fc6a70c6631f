"""No process is left behind: what the kernel can promise about parents and children."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(_worker_id: int = 0, *, parent: int | None = None) -> None:
    """Have the kernel end this process when its parent ends, even by SIGKILL. Linux only.

    Serves as a DataLoader's `worker_init_fn` too. `parent` closes the gap in which the parent may have died
    before this call.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
