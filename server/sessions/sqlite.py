"""The embedded session store: one SQLite file, written by one thread.

Whatever waits when the thread gets to it shares one transaction and one fsync. A request that fails
undoes only its own part. The answers leave after the commit.
"""

import asyncio
import contextlib
import json
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.errors import StorageFailed
from server.sessions.store import SessionRecord, StoreError, StoreTotals

log = logging.getLogger(__name__)

APPLICATION_ID = 0x6C746E64
SCHEMA_VERSION = 1
PAGE_BYTES = 4096
"""SQLite moves the first bytes of a row about when it balances its trees, and leaves copies that no
delete finds. Behind padding of a page, metadata and blob lie in overflow pages, which stay where
they are until secure_delete zeroes them."""

SCHEMA = f"""
BEGIN;
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    last_used_at REAL NOT NULL,
    turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob({PAGE_BYTES})),
    metadata TEXT NOT NULL
) STRICT;
CREATE TABLE checkpoints (
    session_number INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE,
    turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob({PAGE_BYTES})),
    blob BLOB NOT NULL,
    PRIMARY KEY (session_number, turn)
) STRICT;
CREATE TABLE totals (num_states INTEGER NOT NULL, state_bytes INTEGER NOT NULL) STRICT;
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER added AFTER INSERT ON checkpoints BEGIN
    UPDATE totals SET num_states = num_states + 1, state_bytes = state_bytes + NEW.num_bytes;
END;
CREATE TRIGGER removed AFTER DELETE ON checkpoints BEGIN
    UPDATE totals SET num_states = num_states - 1, state_bytes = state_bytes - OLD.num_bytes;
END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
RECORD = "id, created_at, last_used_at, turn, num_tokens, metadata"
CHECKPOINT = "session_number, turn, num_tokens, num_bytes, blob"
MOST_TOGETHER = 256
T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    erases: bool
    """What it deletes must not stay in the write-ahead log."""

    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Any]"


class SQLiteStore:
    """A SessionStore in one file; `-wal` beside it belongs to it while the store is open."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StoreError: damaged, foreign, newer, in use or not writable."""
        self._path = path
        self._db = _open(path)
        self.totals = _totals(self._db)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = False
        self._must_erase = False
        """What was deleted is still in the write-ahead log."""

        self._thread = threading.Thread(target=self._main, name="session-store", daemon=True)
        self._thread.start()

    async def create(self, record: SessionRecord) -> None:
        values = (
            *(record.id, record.created_at, record.last_used_at, record.turn, record.num_tokens),
            json.dumps(record.metadata),
        )

        def work(db: sqlite3.Connection) -> None:
            db.execute(f"INSERT INTO sessions ({RECORD}) VALUES (?, ?, ?, ?, ?, ?)", values)

        await self._run(work)

    async def get(self, session_id: str) -> SessionRecord | None:
        def work(db: sqlite3.Connection) -> SessionRecord | None:
            row = db.execute(f"SELECT {RECORD} FROM sessions WHERE id = ?", [session_id]).fetchone()
            return None if row is None else _record(row)

        return await self._run(work)

    async def list(self, limit: int, after: str | None) -> list[SessionRecord]:
        def work(db: sqlite3.Connection) -> list[SessionRecord]:
            rows = db.execute(
                f"""SELECT {RECORD} FROM sessions WHERE ?1 IS NULL
                OR number < (SELECT number FROM sessions WHERE id = ?1)
                ORDER BY number DESC LIMIT ?2""",
                [after, limit],
            )
            return [_record(row) for row in rows]

        return await self._run(work)

    async def commit_turn(
        self, session_id: str, turn: int, num_tokens: int, used_at: float, blob: bytes
    ) -> None:
        def work(db: sqlite3.Connection) -> None:
            updated = db.execute(
                """UPDATE sessions SET turn = ?1, num_tokens = ?2, last_used_at = ?3
                WHERE id = ?4 AND turn = ?1 - 1 RETURNING number""",
                [turn, num_tokens, used_at, session_id],
            ).fetchone()
            if updated is None:
                raise StorageFailed(f"session {session_id} is not at turn {turn - 1} any more")
            db.execute("DELETE FROM checkpoints WHERE session_number = ?", updated)
            db.execute(
                f"INSERT INTO checkpoints ({CHECKPOINT}) VALUES (?, ?, ?, ?, ?)",
                [updated[0], turn, num_tokens, len(blob), blob],
            )

        await self._run(work)

    async def load_blob(self, session_id: str) -> bytes | None:
        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute(
                """SELECT blob FROM checkpoints JOIN sessions
                ON session_number = number AND checkpoints.turn = sessions.turn WHERE id = ?""",
                [session_id],
            ).fetchone()
            return None if row is None else bytes(row[0])

        return await self._run(work)

    async def delete(self, session_id: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM sessions WHERE id = ?", [session_id]).rowcount > 0

        return await self._run(work, erases=True)

    async def close(self) -> None:
        """Finish what was asked for and close the file."""
        self._closing = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _run(self, work: Callable[[sqlite3.Connection], T], *, erases: bool = False) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        if self._closing:
            raise StorageFailed("the session store is closed")
        self._jobs.put(_Job(work, erases, loop, answer))
        return await answer

    def _main(self) -> None:
        closing = False
        while not closing:
            jobs = [self._jobs.get()]
            while len(jobs) < MOST_TOGETHER and not self._jobs.empty():
                jobs.append(self._jobs.get())
            closing = None in jobs
            self._run_together([job for job in jobs if job is not None])
        self._db.close()

    def _run_together(self, jobs: Sequence[_Job]) -> None:
        """One transaction for all of them; then the answers."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            results = [self._run_one(job) for job in jobs]
            totals = _totals(self._db)
            self._db.execute("COMMIT")
        except Exception as error:  # whatever it was, all get an answer and this thread goes on
            results = [_failed(error)] * len(jobs)
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        else:
            self.totals = totals
            failed = self._erase(any(job.erases for job in jobs))
            if failed is not None:
                results = [
                    failed if job.erases else result
                    for job, result in zip(jobs, results, strict=True)
                ]
        for job, result in zip(jobs, results, strict=True):
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                job.loop.call_soon_threadsafe(_answer, job.answer, result)

    def _erase(self, something_deleted: bool) -> StorageFailed | None:
        """Empty the write-ahead log if it holds what was deleted, now or when this failed before.

        Returns why it failed; it is tried again after the next transaction.
        """
        self._must_erase = self._must_erase or something_deleted
        try:
            if self._must_erase:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            return _failed(error)
        self._must_erase = False
        return None

    def _run_one(self, job: _Job) -> Any:
        """The job's result, or the error that undid it and nothing else."""
        self._db.execute("SAVEPOINT one")
        try:
            result = job.work(self._db)
        except Exception as error:  # whatever it was, the others' work and this thread go on
            self._db.execute("ROLLBACK TO one")
            result = error if isinstance(error, StorageFailed) else _failed(error)
        self._db.execute("RELEASE one")
        return result


def _answer(answer: "asyncio.Future[Any]", result: Any) -> None:
    if answer.cancelled():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _failed(error: Exception) -> StorageFailed:
    message = f"the session store failed: {_line(error)}"
    log.error(message)
    failed = StorageFailed(message)
    failed.__cause__ = error
    return failed


def _totals(db: sqlite3.Connection) -> StoreTotals:
    return StoreTotals(*db.execute("SELECT num_states, state_bytes FROM totals").fetchone())


def _record(row: tuple[Any, ...]) -> SessionRecord:
    session_id, created_at, last_used_at, turn, num_tokens, metadata = row
    return SessionRecord(
        session_id, created_at, last_used_at, turn, num_tokens, json.loads(metadata)
    )


def _open(path: Path) -> sqlite3.Connection:
    """The database with its schema, locked for this process. Raises StoreError."""
    db = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        _check_ours(db, path)
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA foreign_keys = ON")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            db.executescript(SCHEMA)
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
        db.execute(f"SELECT {RECORD} FROM sessions LIMIT 1").fetchone()
        _totals(db)
    except (sqlite3.Error, OSError, StoreError, TypeError, ValueError) as error:
        if db is not None:
            db.close()
        raise StoreError(_reason(path, error)) from error
    return db


def _check_ours(db: sqlite3.Connection, path: Path) -> None:
    application_id = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application_id == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StoreError(f"{path}: written by a newer latentd (store version {version})")
    is_empty = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if application_id != APPLICATION_ID and not (is_empty and application_id == 0):
        raise StoreError(f"{path}: not a latentd session store")


def _reason(path: Path, error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    match code:
        case sqlite3.SQLITE_BUSY:
            return f"{path}: in use by another latentd server"
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return f"{path}: damaged, or not a latentd session store ({_line(error)})"
        case _ if isinstance(error, TypeError | ValueError):  # a value of a kind we never write
            return f"{path}: damaged ({_line(error)})"
        case _:
            return str(error) if isinstance(error, StoreError) else f"{path}: {_line(error)}"


def _line(error: Exception) -> str:
    """What it says, in one line: SQLite quotes what it cannot read."""
    return " ".join(str(error).split())[:200]
