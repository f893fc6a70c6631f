"""A file lock, so that only one process at a time trains in a run folder."""

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from distrib.errors import DamagedFileError, RunDirError
from distrib.run_folder.files import open_regular

LOCK = ".lock"
_SECONDS_TO_DIE = 5.0  # how long to wait for a killed process or its workers to end


class Lock:
    """A lock on a file in the run folder, held until this process ends or calls `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def hold(self) -> str | None:
        """Acquire the lock. Return a warning if the file system has no locks.

        Raises RunDirError if another process holds the lock, OSError if the file cannot be created.
        """
        if os.path.lexists(self.path) and not self.path.is_file():
            raise RunDirError(f"{self.path}: not a regular file; remove it")
        self._file = self.path.open("a")
        deadline = time.monotonic() + _SECONDS_TO_DIE
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    self.release()
                    raise RunDirError(
                        f"{self.path.parent}: another process is training in it; wait until it ends, or choose another "
                        "folder with --run-dir"
                    ) from None
            except OSError as error:
                return f"{self.path.parent}: {error.strerror}: no locks here, so a second start would not be refused"
            time.sleep(0.1)

    def held(self) -> bool:
        """Return whether a process holds the lock now. False if that cannot be determined."""
        try:
            with open_regular(self.path) as lock:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except (OSError, DamagedFileError):
            return False
        return False

    def release(self) -> None:
        """Let other processes train in this folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
