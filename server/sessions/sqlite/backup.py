"""Backups: a folder with the database, the files of large states, and their checksums.

The list of checksums, in the format of `sha256sum -c`, is written last: a folder without it is not
a complete backup.
"""

import hashlib
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from model.files import read_file
from server.sessions.sqlite.files import link_or_copy, sync_folder
from server.sessions.sqlite.schema import check_store, one_line
from server.sessions.sqlite.snapshots import SnapshotError, connect, snapshot
from server.sessions.sqlite.store import STORE_FILE, states_folder
from server.sessions.store import StoreError

CHECKSUMS = "SHA256SUMS"


class BackupError(Exception):
    """The backup or restore failed and had no effect; the message is one line."""


@dataclass(frozen=True)
class Contents:
    """Contents of a backup."""

    num_sessions: int
    num_responses: int
    num_states: int
    num_bytes: int
    """Size of its files."""

    num_missing: int
    """States whose files were lost before the backup."""


def backup(data_dir: Path, destination: Path) -> Contents:
    """Back up a data folder, with or without a running server, into an empty folder.

    On return it is durable. Raises BackupError.
    """
    try:
        if destination.exists() and any(destination.iterdir()):
            raise BackupError(f"{destination} is not empty")
        with snapshot(data_dir) as source:
            _make_folders(destination)
            sums = {}
            for path in sorted(each for each in source.rglob("*") if each.is_file()):
                name = path.relative_to(source)
                link_or_copy(path, destination / name)
                sums[str(name)] = _sync_file(destination / name)
        sync_folder(states_folder(destination / STORE_FILE))
        lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
        (destination / CHECKSUMS).write_text("".join(lines))
        _sync_file(destination / CHECKSUMS)
        sync_folder(destination)
        sync_folder(destination.absolute().parent)
        return _contents(destination)
    except (SnapshotError, StoreError) as error:
        raise BackupError(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        raise BackupError(one_line(error)) from error


def restore(source: Path, data_dir: Path) -> Contents:
    """Verify a backup and restore it into a data folder without a store.

    On return it is durable. Raises BackupError, and then leaves no store.
    """
    try:
        sums = _read_sums(source)
        data_dir.mkdir(0o700, parents=True, exist_ok=True)
        _check_free(data_dir)
        with tempfile.TemporaryDirectory(prefix="restore-", dir=data_dir) as folder:
            made = Path(folder)
            _make_folders(made)
            for name, digest in sums.items():
                shutil.copyfile(source / name, made / name)
                if _sync_file(made / name) != digest:
                    raise BackupError(f"{source / name} is damaged: its checksum does not match")
                (made / name).chmod(0o600)
            check_store(made / STORE_FILE)
            contents = _contents(made)
            sync_folder(states_folder(made / STORE_FILE))
            _chown(made, data_dir)
            states_folder(made / STORE_FILE).rename(states_folder(data_dir / STORE_FILE))
            # fails if a store was created meanwhile
            os.link(made / STORE_FILE, data_dir / STORE_FILE)
            sync_folder(data_dir)
        return contents
    except StoreError as error:
        raise BackupError(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        raise BackupError(one_line(error)) from error


def _make_folders(folder: Path) -> None:
    folder.mkdir(0o700, parents=True, exist_ok=True)
    states_folder(folder / STORE_FILE).mkdir(0o700)


def _check_free(data_dir: Path) -> None:
    """Raises BackupError if the folder has a store."""
    connection = connect(data_dir)
    if connection is not None:
        connection.close()
        raise BackupError(f"a server is running on {data_dir}")
    states = states_folder(data_dir / STORE_FILE)
    if states.exists() and not any(states.iterdir()):
        states.rmdir()
    for path in data_dir.glob(f"{STORE_FILE}*"):
        raise BackupError(f"{path} exists: restore into a folder without a store")


def _read_sums(source: Path) -> dict[str, str]:
    """Checksums by file name. Raises BackupError and OSError."""
    path = source / CHECKSUMS
    if not path.exists():
        raise BackupError(f"{source} is not a complete backup: it has no {CHECKSUMS}")
    sums = dict[str, str]()
    for line in read_file(path).decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        parts = Path(name).parts
        if parts[:-1] not in ((), (states_folder(Path(STORE_FILE)).name,)) or ".." in parts:
            raise BackupError(f"{path} names {name!r}, which is not part of a backup")
        sums[name] = digest
    if STORE_FILE not in sums:
        raise BackupError(f"{path} does not list {STORE_FILE}")
    return sums


def _sync_file(path: Path) -> str:
    """Make a file durable. Returns its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contents(folder: Path) -> Contents:
    states = {path.name for path in states_folder(folder / STORE_FILE).iterdir()}
    with closing(sqlite3.connect(f"file:{folder / STORE_FILE}?mode=ro", uri=True)) as db:
        [num_sessions, num_responses, num_states] = db.execute(
            """SELECT (SELECT count(*) FROM entries WHERE kind = 'session'),
            (SELECT count(*) FROM entries WHERE kind = 'response'),
            (SELECT count(*) FROM checkpoints)"""
        ).fetchone()
        rows = db.execute("SELECT state_id FROM checkpoints WHERE blob IS NULL")
        named = {state_id for (state_id,) in rows}
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Contents(num_sessions, num_responses, num_states, num_bytes, len(named - states))


def _chown(made: Path, data_dir: Path) -> None:
    """Files restored by root get the owner of the data folder."""
    if os.geteuid() == 0:
        owner = data_dir.stat()
        for path in (made, *made.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
