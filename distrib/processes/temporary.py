"""A folder for the temporary files of libraries, which is removed even if the process was killed."""

import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path

from distrib.errors import ConfigError

_PREFIX = "distrib-"
_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # longest sun_path of unix(7), without its final null
_LOCK = "held-while-its-process-lives"
_AFTER_SOCKETS = -101  # multiprocessing removes its own folder at -100

_own: tuple[int, Path] | None = None  # the process id that made the folder, and its path


def check_length(num_workers: int) -> None:
    """Raise ConfigError if the temporary folder's path is too long for the sockets of workers.

    torch makes these sockets in the temporary folder. The kernel limits the length of their paths, and a worker whose
    path is too long hangs.
    """
    folder = tempfile.gettempdir()
    longest = _SOCKET_PATH - len(
        f"/{_PREFIX}12345678/pymp-12345678/listener-12345678"
    )  # longest names that multiprocessing gives
    if num_workers and len(os.fsencode(folder)) > longest:
        raise ConfigError(
            f"data.num_workers: {num_workers}, but the path of the temporary folder {folder} is too long for the "
            f"sockets of workers; set TMPDIR to one of at most {longest} characters, such as /tmp"
        )


def folder() -> Path:
    """Return this process's folder in the temporary folder. The first call makes it.

    It is removed when the process ends, or if the process is killed, by the next process that calls this function.
    """
    global _own
    if _own is None:
        from multiprocessing import util  # imported late, because not every command needs it

        _remove_folders_of_dead_processes()
        _own = os.getpid(), _make()
        util.Finalize(None, remove, exitpriority=_AFTER_SOCKETS)
    return _own[1]


def put_worker_sockets_there() -> None:
    """Make multiprocessing create the sockets of this process and its workers in `folder`."""
    from multiprocessing import util

    before, tempfile.tempdir = tempfile.tempdir, str(folder())
    try:
        util.get_temp_dir()  # makes one at the first call
    finally:
        tempfile.tempdir = before


def remove() -> None:
    """Remove the folder of this process, if it has one."""
    if _own is not None and _own[0] == os.getpid():
        shutil.rmtree(_own[1], ignore_errors=True)


def _make() -> Path:
    while True:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by this process, and by the workers that it forks
        if made.exists():  # otherwise another process has removed it before it was locked
            return made
        os.close(lock)


def _remove_folders_of_dead_processes() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # its process lives
            pass
        finally:
            os.close(descriptor)
