"""Space on the disk that a store has for itself, so that a full disk can be freed.

A delete writes to the write-ahead log before anything is free. So the log's file always has a few
bytes, also when nothing is in it; while no server has the store open, another file holds them.
The database's file grows before a commit and not with a checkpoint, so that what the log holds can
always move into the database.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

RESERVED_BYTES = 2 << 20
"""Enough to delete a state that is in the database."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReservedSpace:
    """Of an open database, of which this process has the lock. Every call blocks."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._reserve = reserve_file(path)
        self._log = path.with_name(f"{path.name}-wal")
        # Closing any file descriptor of the database gives up the locks on it.
        self._database = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._reserve.unlink(missing_ok=True)
        self.refill()

    def grow(self, num_bytes: int) -> None:
        """Give the database's file this size, if it is smaller. Raises OSError."""
        size = os.fstat(self._database).st_size
        if size < num_bytes:
            _allocate(self._database, size, num_bytes - size)

    def refill(self) -> None:
        """Give the log's file its space again, as far as the disk has any."""
        with suppress(OSError):
            _allocate_file(self._log)

    @property
    def log_bytes(self) -> int:
        """Of the log's file."""
        with suppress(OSError):
            return self._log.stat().st_size
        return 0

    def close(self) -> None:
        """After the database was closed, which deletes the log."""
        os.close(self._database)
        with suppress(OSError):
            _allocate_file(self._reserve)


def reserve_file(path: Path) -> Path:
    """What holds the space while the database is closed."""
    return path.with_name(f"{path.name}-reserve")


def _allocate_file(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _allocate(file, 0, RESERVED_BYTES)
    finally:
        os.close(file)


def _allocate(file: int, start: int, num_bytes: int) -> None:
    """Raises OSError where there is no space. Does nothing where space cannot be allocated."""
    if sys.platform != "linux":
        return
    try:
        os.posix_fallocate(file, start, num_bytes)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
