"""The files that a store has open, and the disk that they are on."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class OpenFiles:
    """Files and folders by their paths, as they were when this was made. Every call blocks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises OSError."""
        self._opened = {path: _identity(path) for path in paths}

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
        return shutil.disk_usage(next(iter(self._opened)).parent).free


def _identity(path: Path) -> tuple[int, int]:
    """Only looked at: opening and closing a database gives up the locks on it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
