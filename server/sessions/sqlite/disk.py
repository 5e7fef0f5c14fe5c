"""A store's open files and their disk."""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class OpenFiles:
    """Files and folders by path, as of the creation of this object. Every call blocks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises OSError."""
        self._opened = {path: _identity(path) for path in paths}
        self._folder = paths[0].parent

    @property
    def fault(self) -> str | None:
        """Why writes may be lost, if so: a path no longer leads to its file."""
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
        """Free bytes on the disk, for this process. Raises OSError."""
        return shutil.disk_usage(self._folder).free

    @property
    def disk_bytes(self) -> int:
        """Size of the disk in bytes. Raises OSError."""
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
    """Uses stat alone: opening and closing a database would drop the locks on it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
