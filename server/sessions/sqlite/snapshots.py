"""Requests of other processes on the machine to the server that has a store open.

A server listens on a socket in its data folder, for anyone with access to the folder; each
connection sends one line of JSON. The response to `{"snapshot": true}` is the name of a folder next
to the store with its contents at one moment, which the server removes when the connection ends;
`{"erase": OWNER}` erases the owner's data and returns a description of it.
"""

import asyncio
import json
import logging
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.errors import LatentdError, StorageFailed
from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.sessions.store import StoreError

SOCKET = "backup.sock"
PREFIX = "snapshot-"
MAX_ADDRESS_BYTES = 100
LONGEST_LINE = 4096
ASKED_S = 10.0
"""Time limit for sending the request after connecting."""

log = logging.getLogger(__name__)


class SnapshotError(Exception):
    """No snapshot was made; the message is one line."""


@contextmanager
def serve_snapshots(
    store: SQLiteStore, data_dir: Path, erase: Callable[[str], str] | None = None
) -> Iterator[None]:
    """Within the context, other processes can get snapshots of the store in this folder, and call
    `erase`, which returns a description of what it erased for an owner."""
    for left_over in data_dir.glob(f"{PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    path = data_dir / SOCKET
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            path.unlink(missing_ok=True)  # the store is locked by us, so nobody listens there
            with _address(path) as address:
                listener.bind(address)
            path.chmod(0o600)
            listener.listen()
        except OSError as error:
            log.warning("no backups while the server runs: %s: %s", path, error.strerror or error)
            yield
            return
        answering = threading.Thread(
            target=_serve_all,
            args=(listener, store, data_dir, erase),
            name="snapshots",
            daemon=True,
        )
        answering.start()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def snapshot(data_dir: Path) -> Iterator[Path]:
    """Context with a folder that has a snapshot of a data folder's store.

    It is made by the server that has the store open; without one, the store is opened here. Raises
    SnapshotError and OSError.
    """
    connection = connect(data_dir)
    if connection is None:
        with _offline_snapshot(data_dir) as folder:
            yield folder
        return
    with connection, connection.makefile("rw", encoding="utf-8") as answers:
        answers.write(json.dumps({"snapshot": True}) + "\n")
        answers.flush()
        answer = json.loads(answers.readline() or '{"error": "the server has exited"}')
        if "error" in answer:
            raise SnapshotError(f"the server could not make a snapshot: {answer['error']}")
        yield data_dir / answer["folder"]


def connect(data_dir: Path) -> socket.socket | None:
    """Connect to the server of a data folder; None if there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _address(data_dir / SOCKET) as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _offline_snapshot(data_dir: Path) -> Iterator[Path]:
    path = data_dir / STORE_FILE
    if not path.exists():
        raise SnapshotError(f"{path}: no session store")
    try:
        store = SQLiteStore(path)
    except StoreError as error:
        raise SnapshotError(str(error)) from error
    try:
        with _new_snapshot(store, data_dir) as folder:
            yield folder
    finally:
        asyncio.run(store.close())


@contextmanager
def _new_snapshot(store: SQLiteStore, data_dir: Path) -> Iterator[Path]:
    """Raises SnapshotError."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=data_dir))
    except OSError as error:
        raise SnapshotError(str(error)) from error
    try:
        try:
            store.snapshot(folder)
        except (OSError, sqlite3.Error, StorageFailed) as error:
            raise SnapshotError(str(error)) from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve_all(
    listener: socket.socket,
    store: SQLiteStore,
    data_dir: Path,
    erase: Callable[[str], str] | None,
) -> None:
    """Serve connections one after another, until the socket is closed."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError, ValueError):
                connection.settimeout(ASKED_S)
                with connection.makefile("r", encoding="utf-8") as lines:
                    asked = json.loads(lines.readline(LONGEST_LINE) or "{}")
                connection.settimeout(None)
                if "snapshot" in asked:
                    _answer(connection, store, data_dir)
                elif "erase" in asked and erase is not None:
                    _answer_erase(connection, erase, str(asked["erase"]))


def _answer_erase(connection: socket.socket, erase: Callable[[str], str], owner: str) -> None:
    try:
        _send(connection, {"erased": erase(owner)})
    except LatentdError as error:
        log.error("the data of %s was not completely erased: %s", owner, error)
        _send(connection, {"error": str(error)})


def _answer(connection: socket.socket, store: SQLiteStore, data_dir: Path) -> None:
    try:
        with _new_snapshot(store, data_dir) as folder:
            _send(connection, {"folder": folder.name})
            connection.recv(1)  # blocks until the client closes it
    except SnapshotError as error:
        log.error("no snapshot: %s", error)
        _send(connection, {"error": str(error)})


def _send(connection: socket.socket, answer: dict[str, str]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path, or a shorter one to the same file: a socket's address has at most 104 bytes."""
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
