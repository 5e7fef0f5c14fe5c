"""Files that are there wholly or not at all."""

import os
import secrets
from pathlib import Path


def write_file(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write under a temporary name, flush to the disk, rename.

    Without a `mode`, the file's permissions are those of any new file.
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
