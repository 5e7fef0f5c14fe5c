"""Atomic writes, and checked reads of arbitrary files."""

import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""Default size limit of files read as a whole."""

MAX_BLOB_BYTES = 1 << 30
"""Size limit of a file with a session's state, for any model."""


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Raises OSError, also for pipes and devices, without blocking on them.
    """
    with open(path, "rb", opener=_open) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return content


def check_file(path: Path) -> None:
    """Raises OSError unless it is a readable regular file, which a library will open next."""
    os.close(_open(str(path), os.O_RDONLY | os.O_CLOEXEC))


def _open(path: str, flags: int) -> int:
    """The file descriptor of a regular file. Raises OSError."""
    file = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def write_file(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write to a temporary file, fsync, rename.

    Without `mode`, the permissions are those of any new file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, value: Any) -> None:
    """Add a value to a file of one line of JSON each."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
