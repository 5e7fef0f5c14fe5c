"""Large states, each in its own file next to the database.

A commit writes such a state once, and a delete does not rewrite it. A file is complete and durable
before the database refers to it, and is deleted after the last checkpoint that does; leftovers of a
crash are swept at the next start.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".tmp"


class StateFiles:
    """Blobs by state id. Every call blocks."""

    def __init__(self, folder: Path, *, sync: bool) -> None:
        """`sync`: writes wait for the disk. Raises OSError."""
        self._folder = folder
        self._sync = sync
        folder.mkdir(0o700, exist_ok=True)
        folder.chmod(0o700)
        if sync:
            sync_folder(folder.parent)
        self._counting = threading.Lock()
        self.num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        """Total size of the files."""

    def write(self, state_id: str, blob: bytes) -> None:
        """Write durably. Raises OSError, and then leaves no file."""
        path = self._folder / state_id
        unfinished = path.with_suffix(UNFINISHED)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(unfinished, flags, 0o600), "wb", buffering=0) as file:
                view = memoryview(blob)
                while view:
                    view = view[file.write(view) :]
                if self._sync:
                    os.fsync(file.fileno())
            unfinished.rename(path)
            if self._sync:
                sync_folder(self._folder)
            self._count(len(blob))
        except BaseException:
            for left in (unfinished, path):
                with suppress(OSError):
                    left.unlink(missing_ok=True)
            raise

    def read(self, state_id: str) -> bytes | None:
        """None if the file does not exist. Raises OSError."""
        try:
            return (self._folder / state_id).read_bytes()
        except FileNotFoundError:
            return None

    def beginning(self, state_id: str, most: int) -> bytes:
        """At most `most` bytes from the start; empty if the file does not exist. Raises OSError."""
        with suppress(FileNotFoundError), (self._folder / state_id).open("rb") as file:
            return file.read(most)
        return b""

    def delete(self, state_id: str) -> None:
        """Delete a file, if it exists. Raises OSError."""
        path = self._folder / state_id
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._count(-size)

    def names(self) -> set[str]:
        """Names of all files: state ids and incomplete files. Raises OSError."""
        return {path.name for path in self._folder.iterdir()}

    def link(self, names: Iterable[str], folder: Path) -> None:
        """Link these files, except missing and unfinished ones, into a folder on the same disk.
        Raises OSError."""
        for name in names:
            if not name.endswith(UNFINISHED):
                with suppress(FileNotFoundError):
                    link_or_copy(self._folder / name, folder / name)

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.num_bytes += num_bytes


def link_or_copy(source: Path, path: Path) -> None:
    """Create a hard link, or a copy if links are not supported. Raises OSError."""
    try:
        os.link(source, path)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copyfile(source, path)
        path.chmod(0o600)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
