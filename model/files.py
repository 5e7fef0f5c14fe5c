"""Files that are there wholly or not at all."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write under a temporary name, flush to the disk, rename.

    Without a `mode`, the file's permissions are those of any new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)  # before there is anything to read
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
