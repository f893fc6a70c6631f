"""Formats an exception for the user: only the frames in their own files, not those of libraries."""

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+), in .+\n(?:    .*\n)*')
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_OF_A_WORKER = "Original Traceback (most recent call last):\n"  # torch puts a DataLoader worker's traceback after it


def format_error(error: BaseException) -> str:
    """Return the traceback with the user's frames only. If it has none, return it whole: then the bug is ours."""
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return "".join(traceback.format_exception_only(error)).rstrip()  # a file that did not compile has no frame
    return users_lines(error) or "".join(traceback.format_exception(error)).rstrip()


def users_lines(error: BaseException) -> str | None:
    """Return the frames in the user's files and the exception, causes first as in Python; None if there are none."""
    frames = [found.group() for found in _FRAME.finditer("".join(_frames(error))) if _is_users(found["file"])]
    if not frames:
        return None
    own = "Traceback (most recent call last):\n" + "".join(frames) + summary(error)
    before = None if error.__cause__ is None else users_lines(error.__cause__)
    return own if before is None else f"{before}\n\nThis caused:\n\n{own}"


def summary(error: BaseException) -> str:
    """Return type and message, as in the last line of a traceback. Also for an exception of a DataLoader's worker."""
    if _OF_A_WORKER in _message(error):
        in_worker = _FRAME.sub("", _message(error).split(_OF_A_WORKER, 1)[1])
        return in_worker.strip()
    return "".join(traceback.format_exception_only(error)).strip()


def first_line(error: BaseException) -> str:
    """Return type and message in one line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    return summary(error).splitlines()[0]


def place(error: BaseException) -> str:
    """Return ` at FILE:LINE` of the innermost user frame, or an empty string."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    users = [found for found in _FRAME.finditer("".join(_frames(error))) if _is_users(found["file"])]
    return f" at {users[-1]['file']}:{users[-1]['line']}" if users else ""


def is_ours(error: BaseException) -> bool:
    """Return whether this package's own code raised the error, and not the user's or a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_OURS)


def _frames(error: BaseException) -> Iterator[str]:
    yield from traceback.format_tb(error.__traceback__)
    if _OF_A_WORKER in _message(error):
        yield _message(error).split(_OF_A_WORKER, 1)[1]


def _message(error: BaseException) -> str:
    return str(error.args[0]) if error.args else ""


def _is_users(file: str) -> bool:
    installed = "site-packages" in file or "dist-packages" in file
    return not (installed or file.startswith((_OURS, _STANDARD_LIBRARY, "<frozen ")))
