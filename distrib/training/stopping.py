"""Being asked to stop: the handler only takes note, the ranks agree at the end of a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send


@contextmanager
def when_asked_to_stop(take_note: Callable[[], None]) -> Iterator[None]:
    """Within, call `take_note` on SIGTERM and SIGUSR1. Only in the main thread, where Python handles signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: Any) -> None:
        take_note()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
