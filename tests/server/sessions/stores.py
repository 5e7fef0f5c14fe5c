"""SQLite stores for tests, with means to pause their thread and to make SQLite fail."""

import asyncio
import sqlite3
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.sessions.sqlite import store as sqlite_store
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, EntryKind, NewState, Status, StoredAnswer, StoreError
from tests.patience import until

FILE = "sessions.sqlite3"
FILES = f"{FILE}-states"
KINDS: tuple[EntryKind, ...] = ("session", "response")


def session(name: str, **metadata: str) -> Entry:
    """One without a turn."""
    return Entry("session", name, "", 1.0, 2.0, metadata=metadata)


def response(name: str, *, owner: str = "", body: str = '{"é": 1}') -> Entry:
    """A finished one, without a state."""
    return Entry("response", name, owner, 1.0, 2.0, status="completed", body=body)


def pending(name: str, owner: str = "") -> Entry:
    return replace(response(name, owner=owner), status="queued")


def new(kind: EntryKind, name: str) -> Entry:
    """A session without a turn, or a response that is not finished."""
    return session(name) if kind == "session" else pending(name)


def new_state(name: str, turn: int, blob: bytes, answer: StoredAnswer | None = None) -> NewState:
    """The id depends on all arguments."""
    return NewState(f"{name}-{turn}-{zlib.crc32(blob):08x}", blob, answer)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(folder / FILE)
    try:
        yield store
    finally:
        await store.close()


def advanced(before: Entry, turn: int) -> Entry:
    """After a turn, with ten tokens per turn; a response is complete then."""
    status: Status | None = None if before.kind == "session" else "completed"
    entry = replace(before, last_used_at=100.0 + turn, turn=turn, num_tokens=10 * turn)
    return replace(entry.used(entry.last_used_at), status=status)


async def insert(store: SQLiteStore, entry: Entry, blob: bytes | None = None) -> Entry:
    """Add an entry, with the state after its current turn; returns it as stored."""
    if blob is None:
        await store.insert(entry)
        return entry
    state = new_state(entry.id, entry.turn, blob)
    await store.insert(entry, state)
    return replace(entry, state_id=state.id, num_checkpoints=1)


async def commit(
    store: SQLiteStore,
    name: str,
    turn: int,
    blob: bytes,
    *,
    keep: int = 1,
    answer: StoredAnswer | None = None,
    kind: EntryKind = "session",
    ttl_s: float | None = None,
) -> bool:
    """The entry's next turn."""
    before = replace(new(kind, name), ttl_s=ttl_s)
    state = new_state(name, turn, blob, answer)
    return await store.advance(advanced(before, turn), state, keep)


async def found(store: SQLiteStore, name: str, kind: EntryKind = "session") -> Entry:
    entry = await store.get(kind, name)
    assert entry is not None
    return entry


async def blob_of(store: SQLiteStore, name: str, kind: EntryKind = "session") -> bytes | None:
    """The blob of the entry's current state."""
    entry = await store.get(kind, name)
    return None if entry is None else await store.load(name, entry.turn)


async def listed(store: SQLiteStore) -> list[Entry]:
    """All sessions of the nameless owner."""
    return await store.list("session", "", 1000, None, 0.0)


@asynccontextmanager
async def writer_held(store: SQLiteStore) -> AsyncIterator[None]:
    """Within the context the store's thread is paused; requests are queued."""
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


async def written(store: SQLiteStore) -> None:
    """After a transaction behind all that was asked for."""
    await store._run(lambda _: None)


async def until_queued(store: SQLiteStore, count: int = 1) -> None:
    """Wait until this many jobs wait for the store's thread."""
    await until(lambda: store._writer._jobs.qsize() >= count)


@contextmanager
def states_in_files(from_bytes: int = 1) -> Iterator[None]:
    """Treat states of at least this size as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_store, "LARGE_BYTES", from_bytes)
        yield


@contextmanager
def full_disk(store: SQLiteStore, num_pages: int = 0) -> Iterator[None]:
    """The database may only grow by this many pages."""
    db = store._writer.db
    [used] = db.execute("PRAGMA page_count").fetchone()
    [most] = db.execute("PRAGMA max_page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {used + num_pages}")
    try:
        yield
    finally:
        db.execute(f"PRAGMA max_page_count = {most}")


@contextmanager
def forbidden(store: SQLiteStore, action: int, what: str) -> Iterator[None]:
    """Make SQLite fail at this action."""

    def decide(asked: int, argument: str | None, *_: str | None) -> int:
        is_it = (asked, argument) == (action, what)
        return sqlite3.SQLITE_DENY if is_it else sqlite3.SQLITE_OK

    store._writer.db.set_authorizer(decide)
    try:
        yield
    finally:
        store._writer.db.set_authorizer(None)


@contextmanager
def unreadable(store: SQLiteStore) -> Iterator[None]:
    """SQLite fails where somebody begins to read."""

    def decide(asked: int, argument: str | None, *_: str | None) -> int:
        is_it = (asked, argument) == (sqlite3.SQLITE_TRANSACTION, "BEGIN")
        return sqlite3.SQLITE_DENY if is_it else sqlite3.SQLITE_OK

    for db in store._readers.connections:
        db.set_authorizer(decide)
    try:
        yield
    finally:
        for db in store._readers.connections:
            db.set_authorizer(None)


def refusal(path: Path) -> str:
    """The one-line reason why the store cannot be opened."""
    with pytest.raises(StoreError) as caught:
        SQLiteStore(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def raw(folder: Path) -> bytes:
    """All bytes of the store on disk."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def state_files(folder: Path) -> set[str]:
    """Names of the files of large states."""
    return {path.name for path in (folder / FILES).iterdir()}
