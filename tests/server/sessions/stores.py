"""SQLite stores for tests, with ways to hold their thread and to make SQLite fail."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import KeptAnswer, SessionRecord, StoreError, Turn
from tests.patience import until

FILE = "sessions.sqlite3"


def record(name: str, **metadata: str) -> SessionRecord:
    return SessionRecord(name, 1.0, 2.0, metadata=metadata)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(folder / FILE)
    try:
        yield store
    finally:
        await store.close()


async def commit(
    store: SQLiteStore,
    name: str,
    turn: int,
    blob: bytes,
    *,
    keep: int = 1,
    answer: KeptAnswer | None = None,
) -> None:
    """A turn after which the session has ten tokens for each of its turns."""
    await store.commit(name, Turn(turn, 10 * turn, 100.0 + turn, blob, answer), keep)


async def blob_of(store: SQLiteStore, name: str) -> bytes | None:
    """What the session's present state is kept as."""
    found = await store.get(name)
    return None if found is None else await store.load_blob(name, found.turn)


async def listed(store: SQLiteStore) -> list[SessionRecord]:
    """All sessions of the owner that `record` names."""
    return await store.list("", 1000, None, 0.0)


@asynccontextmanager
async def writer_held(store: SQLiteStore) -> AsyncIterator[None]:
    """While the block runs the store's thread waits; what is asked for meanwhile runs after it."""
    reached, go = threading.Event(), threading.Event()

    def wait(db: sqlite3.Connection) -> None:
        del db
        reached.set()
        go.wait()

    waiting = asyncio.create_task(store._run(wait))
    await asyncio.to_thread(reached.wait)
    try:
        yield
    finally:
        go.set()
        await waiting


async def until_waiting(store: SQLiteStore, count: int = 1) -> None:
    """Until so many calls wait for the store's thread, which is held."""
    await until(lambda: store._writer._jobs.qsize() == count)


@contextmanager
def forbidden(store: SQLiteStore, action: int, what: str) -> Iterator[None]:
    """SQLite fails where it would do this."""

    def decide(asked: int, argument: str | None, *_: str | None) -> int:
        is_it = (asked, argument) == (action, what)
        return sqlite3.SQLITE_DENY if is_it else sqlite3.SQLITE_OK

    store._writer.db.set_authorizer(decide)
    try:
        yield
    finally:
        store._writer.db.set_authorizer(None)


def refusal(path: Path) -> str:
    """The one line that says why the store cannot be opened."""
    with pytest.raises(StoreError) as caught:
        SQLiteStore(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def raw(folder: Path) -> bytes:
    """Every byte that the store has on the disk."""
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
