"""Signals that ask a process to stop. While it trains the handler only takes note, and the ranks agree on stopping at
the end of a step; before and after there is nothing to save, and it ends at once.

A signal that was ignored when the process started, as SIGHUP is under nohup, stays ignored.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distrib.processes.lifetimes import STOP_SIGNALS
from distrib.processes.schedulers.base import requeue
from distrib.processes.schedulers.registry import of_this_process

SAVED = 75  # EX_TEMPFAIL: the exit code of a process that was asked to stop and lost nothing
INTERRUPTED = 130  # 128 + SIGINT, as shells do
# Schedulers send these some time before they kill a job. One that can is then asked to start the job again.
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
# SIGTERM and SIGINT end a process that is not training, as they end any other; but see `Scheduler.sigterm_means_stop`.
LEAVE_SIGNALS = tuple(number for number in STOP_SIGNALS if number not in (signal.SIGTERM, signal.SIGINT))
_SECONDS_FOR_RANK_0 = 5.0

_postponed: signal.Signals | None = None  # a signal that came to this rank, which is not rank 0, before it trained


def handle(
    numbers: Iterable[signal.Signals], handler: Callable[[int, Any], None] | signal.Handlers
) -> dict[signal.Signals, Any]:
    """Install `handler` for those of the signals that are not ignored. Returns the handlers that were there before."""
    return {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }


@contextmanager
def when_asked_to_stop(take_note: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within, call `take_note` on each of STOP_SIGNALS; on a second SIGINT raise KeyboardInterrupt, and save nothing.

    Only in the main thread, where Python handles signals.
    """
    global _postponed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def note(number: int, _frame: Any) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            # distrib launch ends its ranks itself on a second Ctrl-C, and a scheduler may send each signal to all
            if interrupted and not has_launcher():
                raise KeyboardInterrupt
            interrupted = True
        take_note(signal.Signals(number))

    before = handle(STOP_SIGNALS, note)
    if _postponed is not None:
        take_note(_postponed)
        _postponed = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's


def leave_when_asked(as_launcher: bool = False) -> None:
    """From now on, while it is not training, this process ends with exit code 75 on each of LEAVE_SIGNALS, and a
    launcher, until it passes signals on to its ranks, on each of STOP_SIGNALS. So it does on SIGTERM under a scheduler
    that sends it to stop a job and for nothing else. On SIGINT it ends with exit code 130, also while it imports: numpy
    turns a KeyboardInterrupt in its import into another error.

    Rank 0 decides for all: the others wait for it, so that no launcher ends it before it has said why, or has had the
    job requeued. If rank 0 trains by then, so do they soon, and take note of the signal as it did.
    Under distrib launch rank 0 dies of the signal, even within a call into C++, and its launcher does the rest.
    """
    scheduler = of_this_process()
    leave: tuple[signal.Signals, ...] = LEAVE_SIGNALS
    if scheduler is not None and scheduler.sigterm_means_stop:
        leave = (signal.SIGTERM, *LEAVE_SIGNALS)
    if as_launcher:
        handle(STOP_SIGNALS, _leave)
    elif not has_launcher():
        handle([signal.SIGINT], _interrupted)
        handle(leave, _leave if _rank() == 0 else _postpone)
    elif _rank() == 0:
        handle([signal.SIGINT], signal.SIG_DFL)
    else:
        handle([signal.SIGINT, *LEAVE_SIGNALS], _postpone)


def nothing_to_save(number: int) -> None:
    """Print that the run was asked to stop by this signal while it was not training, and requeue the job if the signal
    means that. Rank 0 and its launcher do; others wait until the scheduler ends them."""
    then, scheduler = "start it again", of_this_process()
    if scheduler is not None and scheduler.can_requeue and number in REQUEUE_SIGNALS:
        if _rank() == 0:
            then = requeue(scheduler).message
        else:
            time.sleep(scheduler.seconds_to_requeue)
    with suppress(OSError):  # not print: the signal may have interrupted one
        os.write(2, f"asked to stop while not training, nothing to save; {then}\n".encode())


def _leave(number: int, _frame: Any) -> None:
    # A second one changes nothing. A job that is requeued gets SIGTERM at once, before that can be printed.
    again = [other for other in STOP_SIGNALS if signal.getsignal(other) is _leave or other == signal.SIGTERM]
    handle(again, lambda *_: None)
    nothing_to_save(number)
    os._exit(SAVED)


def _interrupted(_number: int, _frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _postpone(number: int, _frame: Any) -> None:
    global _postponed
    if _postponed is None:
        _postponed = signal.Signals(number)
        _thread.start_new_thread(_leave_later, (number,))  # threading's takes locks that the main thread may hold


def _leave_later(number: int) -> None:
    time.sleep(_SECONDS_FOR_RANK_0)
    if _postponed is not None:
        nothing_to_save(number)
    if _postponed is not None:  # it did not begin to train meanwhile
        os._exit(SAVED)


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0  # what is no number is refused later


def has_launcher() -> bool:
    """Was this rank started by distrib launch, which then says what there is to say?"""
    return os.environ.get("DISTRIB_LAUNCHER") == "distrib"
