"""Being asked to stop: the handler only takes note, the ranks agree at the end of a step.

SIGTERM and SIGUSR1 are what schedulers send, SIGINT is Ctrl-C. SIGUSR1 is also a wish to be started again: where SLURM
runs the job, it is requeued.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distrib import slurm

SAVED = 75  # EX_TEMPFAIL: what we end with when we were asked to stop, and lost nothing
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def when_asked_to_stop(take_note: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within, call `take_note` on each of the signals; on a second SIGINT raise KeyboardInterrupt, and save nothing.

    Only in the main thread, where Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(number: int, _frame: Any) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
        take_note(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_when_asked() -> None:
    """From now on SIGUSR1 ends this process, which has nothing to save, as if it had been asked to stop while training.

    SIGTERM does so as it is. Otherwise a job that is asked to stop while it imports and connects would have failed.
    """
    signal.signal(signal.SIGUSR1, _leave)


def _leave(_number: int, _frame: Any) -> None:
    job = slurm.in_job(os.environ)
    if int(os.environ.get("RANK", 0)) == 0:
        then = "start it again" if job is None else slurm.requeue(job)
        print(f"asked to stop while not training, nothing to save; {then}", file=sys.stderr, flush=True)
    elif job is not None:
        time.sleep(slurm.SECONDS_TO_REQUEUE)
    os._exit(SAVED)
