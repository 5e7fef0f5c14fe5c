"""Reserved disk space, so that a full disk can be freed.

A delete writes to the write-ahead log before anything is freed. The log's file therefore always
keeps some space, even when empty; while no server has the store open, another file holds it. The
database's file grows before a commit and not at a checkpoint, so that the log can always be moved
into the database.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

RESERVED_BYTES = 2 << 20
"""Enough to delete a state in the database."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReservedSpace:
    """The reserved space of an open database that this process has locked. Every call blocks."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._reserve = reserve_file(path)
        self._log = path.with_name(f"{path.name}-wal")
        # Closing any file descriptor of the database drops the locks on it.
        self._database = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._reserve.unlink(missing_ok=True)
        self.refill()

    def grow(self, num_bytes: int) -> None:
        """Grow the database's file to this size. Raises OSError."""
        size = os.fstat(self._database).st_size
        if size < num_bytes:
            _allocate(self._database, size, num_bytes - size)

    def refill(self) -> None:
        """Restore the log's space, as far as the disk permits."""
        with suppress(OSError):
            _allocate_file(self._log)

    @property
    def log_bytes(self) -> int:
        """Of the log's file."""
        with suppress(OSError):
            return self._log.stat().st_size
        return 0

    def close(self) -> None:
        """Call after closing the database, which deletes the log."""
        os.close(self._database)
        with suppress(OSError):
            _allocate_file(self._reserve)


def reserve_file(path: Path) -> Path:
    """The file that holds the space while the database is closed."""
    return path.with_name(f"{path.name}-reserve")


def _allocate_file(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _allocate(file, 0, RESERVED_BYTES)
    finally:
        os.close(file)


def _allocate(file: int, start: int, num_bytes: int) -> None:
    """Raises OSError if there is no space. Does nothing if the system cannot allocate space."""
    if sys.platform != "linux":
        return
    try:
        os.posix_fallocate(file, start, num_bytes)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
