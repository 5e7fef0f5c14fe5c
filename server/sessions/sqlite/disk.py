"""The files that a store has open, and the disk that they are on."""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class OpenFiles:
    """Files and folders by their paths, as they were when this was made. Every call blocks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises OSError."""
        self._opened = {path: _identity(path) for path in paths}
        self._folder = paths[0].parent

    @property
    def fault(self) -> str | None:
        """Why what is written now may be lost, if so: a path does not lead to the file any more."""
        for path, opened in self._opened.items():
            try:
                found = _identity(path)
            except FileNotFoundError:
                return f"{path} was deleted while the server ran"
            except OSError as error:
                return f"{path}: {error.strerror}"
            if found != opened:
                return f"{path} was replaced while the server ran"
        return None

    @property
    def free_bytes(self) -> int:
        """Of the disk, for this process. Raises OSError."""
        return shutil.disk_usage(self._folder).free

    @property
    def disk_bytes(self) -> int:
        """Of the disk, used or free. Raises OSError."""
        return shutil.disk_usage(self._folder).total


def lock_folder(path: Path) -> int:
    """Have a folder for oneself until the returned file descriptor is closed. SQLite's locks are
    those of a process: two stores of one process would share a database.

    Raises BlockingIOError where somebody else has it.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise
    except OSError:  # a file system without such locks
        pass
    return folder


def _identity(path: Path) -> tuple[int, int]:
    """Only looked at: opening and closing a database gives up the locks on it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
