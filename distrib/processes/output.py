"""Handles standard output and error that cannot be written: a closed pipe, a closed terminal, a full disk.

A training run continues, because its run folder has everything. A command that only prints ends, as other programs do.
"""

import errno
import io
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any

problems: list[str] = []  # one message for each stream that could not be written, for the run folder
_TEMPORARY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a later write may succeed
_ends_with_reader = False


class _Stream(io.FileIO):
    """A file descriptor whose writes never raise an OSError."""

    problem: str | None = None

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self._failed(error)
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self], [])  # wait: another program has made the descriptor non-blocking

    def _failed(self, error: OSError) -> None:
        if _ends_with_reader and error.errno == errno.EPIPE:
            os._exit(128 + signal.SIGPIPE)
        problem = f"{self.name}: {error.strerror}"
        if _ends_with_reader:
            with suppress(OSError):
                os.write(2, f"error: {problem}\n".encode())
            os._exit(1)
        if self.problem is None:
            self.problem = problem
            problems.append(problem)
        if error.errno not in _TEMPORARY:  # also for code that writes to the descriptor without Python
            _discard(self.fileno())


def keep_writable() -> None:
    """Make sys.stdout and sys.stderr never raise an OSError or UnicodeEncodeError.

    Streams that replace the process's own, such as a notebook's, are left unchanged.
    """
    closed = [descriptor for descriptor in range(3) if not _is_open(descriptor)]
    for descriptor in closed:  # otherwise the next opened file would get a standard stream's number
        _discard(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None and descriptor in closed:
            stream = io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if type(raw) is not io.FileIO or raw.fileno() != descriptor:
            continue
        with suppress(OSError):
            stream.flush()
        lasting = _Stream(descriptor, "w", closefd=False)
        lasting.name = f"<{name}>"
        wrapped = io.TextIOWrapper(
            lasting if stream.buffer is raw else io.BufferedWriter(lasting),
            encoding=stream.encoding,
            errors="backslashreplace",
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapped)
        setattr(sys, f"__{name}__", wrapped)


def end_with_reader() -> None:
    """Make this process end if its output cannot be written; if the reader is gone, with SIGPIPE's exit code."""
    global _ends_with_reader
    _ends_with_reader = True


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _discard(descriptor: int) -> None:
    """Redirect the descriptor, also for programs that inherit it, to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    else:
        os.set_inheritable(descriptor, True)
