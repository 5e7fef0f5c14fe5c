"""The embedded store: one SQLite file with a single writer thread, and files for large states."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from server.errors import StorageFull
from server.sessions.clock import open_clock
from server.sessions.sqlite.disk import OpenFiles, lock_folder
from server.sessions.sqlite.files import StateFiles
from server.sessions.sqlite.pieces import (
    PIECE_BYTES,
    delete_oldest_state,
    overwrite,
    overwritten,
    values_of,
)
from server.sessions.sqlite.reader import Readers
from server.sessions.sqlite.rows import ENTRY, entry_of, find_entry, insert_entry
from server.sessions.sqlite.schema import Durability, open_store, reason
from server.sessions.sqlite.space import ReservedSpace
from server.sessions.sqlite.writer import Writer, storage_error
from server.sessions.store import (
    Entry,
    EntryKind,
    Header,
    NewState,
    StoredAnswer,
    StoreError,
    StoreHealth,
    StoreUsage,
    TurnCheckpoint,
)

STORE_FILE = "sessions.sqlite3"
"""Name of the database in a data folder."""

LARGE_BYTES = 1 << 20
"""Blobs of at least this size are files: SQLite would write them twice, and erase them page by
page."""

FILE_THREADS = 2
"""Separate threads for writing and reading files: commits do not wait for exports."""

DATABASE_FILES = ("", "-wal", "-shm", "-clock")
MAX_HEADER_BYTES = 64 << 10
UNFINISHED = "status IN ('queued', 'in_progress')"

T = TypeVar("T")


class SQLiteStore:
    """A Store in one file, with its `-wal` and `-states` next to it.

    With `durability` async a commit does not wait for the disk: it survives a crash of the process,
    but the last ones may be lost in a power failure.
    """

    def __init__(self, path: Path, durability: Durability = "sync") -> None:
        """Open or create. Raises StoreError for a file that this server cannot use."""
        db = open_store(path, durability)
        locked = list[int]()
        try:
            folder = states_folder(path)
            self._files = StateFiles(folder, sync=durability == "sync")
            locked.append(lock_folder(folder))
            _sweep(db, self._files)
            self._clock = open_clock(path.with_name(f"{path.name}-clock"), partial(_latest_use, db))
            self._opened = OpenFiles((path, path.with_name(f"{path.name}-wal"), folder))
            self._space = ReservedSpace(path)
            self._readers = Readers(path)
        except (OSError, sqlite3.Error, TypeError, ValueError) as error:
            db.close()
            if locked:
                os.close(*locked)
            raise StoreError(reason(path, error)) from error
        self._path = path
        self._locked = locked
        self._writer = Writer(db, self._files, self._space)
        self._run = self._writer.run
        self._writing = ThreadPoolExecutor(FILE_THREADS, "written-states")
        self._reading = ThreadPoolExecutor(FILE_THREADS, "read-states")

    @property
    def total(self) -> StoreUsage:
        return self._writer.total

    def now(self) -> float:
        return self._clock.now()

    async def health(self) -> StoreHealth:
        return await asyncio.to_thread(self._look)

    def snapshot(self, folder: Path) -> None:
        """Copy everything, as of one moment before this returns, into a folder on the same disk,
        not necessarily durably; commits continue meanwhile.

        State files are only deleted in the writer's thread, after the commit that drops their last
        reference: all files that the copied database refers to exist at the moment of the copy, and
        are linked then. Blocks; call it from a thread other than the event loop's. Raises OSError,
        sqlite3.Error and StorageFailed.
        """
        states = states_folder(folder / self._path.name)
        states.mkdir(0o700)
        self._files.link(self._files.names(), states)  # most of them, while commits continue
        named = set[str]()

        def link_rest(db: sqlite3.Connection) -> None:
            rows = db.execute("SELECT state_id FROM checkpoints WHERE blob IS NULL")
            named.update(state_id for (state_id,) in rows)
            self._files.link(named - {path.name for path in states.iterdir()}, states)

        database = folder / self._path.name
        database.touch(0o600, exist_ok=False)
        self._writer.copy(database, link_rest)
        for path in states.iterdir():
            if path.name not in named:
                path.unlink()

    async def insert(self, entry: Entry, state: NewState | None = None) -> None:
        def work(db: sqlite3.Connection) -> bool:
            number = insert_entry(db, entry)
            if state is not None:
                _add_checkpoint(db, number, entry, state)
            return True

        await self._write(work, state)

    async def advance(self, entry: Entry, state: NewState | None, keep: int) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            found = db.execute(
                f"""SELECT number FROM entries
                WHERE id = ? AND turn = ? AND (status IS NULL OR {UNFINISHED})""",
                [entry.id, entry.turn - (state is not None)],
            ).fetchone()
            if found is None:
                return False
            [number] = found
            if state is not None:
                db.execute(
                    "DELETE FROM checkpoints WHERE entry_number = ? AND turn <= ?",
                    [number, entry.turn - keep],
                )  # first: new rows can reuse their pages, even on a full disk
            db.execute(
                """UPDATE entries SET turn = ?, num_tokens = ?, last_used_at = ?, expires_at = ?,
                status = ?, body = ?, num_bytes = ? WHERE number = ?""",
                [
                    *(entry.turn, entry.num_tokens, entry.last_used_at, entry.expires_at),
                    *(entry.status, entry.body, entry.num_bytes, number),
                ],
            )
            if state is not None:
                _add_checkpoint(db, number, entry, state)
            return True

        return await self._write(work, state)

    async def rewrite_unfinished(
        self, rewrite: Callable[[Entry], Entry], but: frozenset[str]
    ) -> int:
        def work(db: sqlite3.Connection) -> int:
            rows = db.execute(f"SELECT {ENTRY} FROM entries WHERE {UNFINISHED}").fetchall()
            found = [entry for entry in map(entry_of, rows) if entry.id not in but]
            for entry in map(rewrite, found):
                db.execute(
                    "UPDATE entries SET status = ?, body = ?, num_bytes = ? WHERE id = ?",
                    [entry.status, entry.body, entry.num_bytes, entry.id],
                )
            return len(found)

        return await self._run(work)

    async def get(self, kind: EntryKind, entry_id: str) -> Entry | None:
        entry = await self._read(lambda db: find_entry(db, entry_id))
        return None if entry is None or entry.kind != kind else entry

    async def list(
        self, kind: EntryKind, owner: str, limit: int, after: str | None, now: float
    ) -> list[Entry]:
        def work(db: sqlite3.Connection) -> list[Entry]:
            rows = db.execute(
                f"""SELECT {ENTRY} FROM entries WHERE kind = ?1 AND owner = ?2
                AND (?3 IS NULL OR number < (SELECT number FROM entries WHERE id = ?3))
                AND (expires_at IS NULL OR expires_at > ?4)
                ORDER BY number DESC LIMIT ?5""",
                [kind, owner, after, now, limit],
            )
            return [entry_of(row) for row in rows]

        return await self._read(work)

    async def usage(self, owner: str) -> StoreUsage:
        def work(db: sqlite3.Connection) -> StoreUsage:
            row = db.execute(
                """SELECT num_sessions, num_responses, num_states, num_bytes FROM owners
                WHERE owner = ?""",
                [owner],
            ).fetchone()
            return StoreUsage() if row is None else StoreUsage(*row)

        return await self._read(work)

    async def checkpoints(self, entry_id: str) -> Sequence[TurnCheckpoint]:
        def work(db: sqlite3.Connection) -> Sequence[TurnCheckpoint]:
            rows = db.execute(
                """SELECT turn, num_tokens, created_at, num_bytes, state_id FROM checkpoints
                WHERE entry_number = (SELECT number FROM entries WHERE id = ?)
                ORDER BY turn DESC""",
                [entry_id],
            )
            return [TurnCheckpoint(*row) for row in rows]

        return await self._read(work)

    async def find_answer(self, entry_id: str, key: str) -> StoredAnswer | None:
        def work(db: sqlite3.Connection) -> StoredAnswer | None:
            row = db.execute(
                """SELECT key, request, answer FROM answers
                WHERE entry_number = (SELECT number FROM entries WHERE id = ?) AND key = ?""",
                [entry_id, key],
            ).fetchone()
            is_blank = row is None or row[2].isspace()  # while it is being deleted
            return None if is_blank else StoredAnswer(*row)

        return await self._read(work)

    async def load(self, entry_id: str, turn: int) -> bytes | None:
        def work(db: sqlite3.Connection) -> tuple[str, bytes | None] | None:
            row: tuple[str, bytes | None] | None = db.execute(
                """SELECT state_id, blob FROM checkpoints
                WHERE entry_number = (SELECT number FROM entries WHERE id = ?) AND turn = ?""",
                [entry_id, turn],
            ).fetchone()
            return row

        found = await self._read(work)
        if found is None:
            return None
        state_id, blob = found
        return await self._read_file(state_id) if blob is None else blob

    async def headers(self, after: int, limit: int) -> Sequence[Header]:
        def work(db: sqlite3.Connection) -> Sequence[Header]:
            rows = db.execute(
                """SELECT number, kind, id, checkpoints.rowid, state_id, typeof(blob) = 'null'
                FROM entries JOIN checkpoints
                ON entry_number = number AND checkpoints.turn = entries.turn
                WHERE number > ? ORDER BY number LIMIT ?""",
                [after, limit],
            )
            return [
                Header(number, kind, entry_id, beginning(db, rowid, state_id, is_file))
                for number, kind, entry_id, rowid, state_id, is_file in rows
            ]

        def beginning(db: sqlite3.Connection, rowid: int, state_id: str, is_file: bool) -> bytes:
            if is_file:
                return self._files.beginning(state_id, MAX_HEADER_BYTES)
            with db.blobopen("checkpoints", "blob", rowid, readonly=True) as blob:
                size = int.from_bytes(blob.read(8), "little")
                return blob.read(min(size, MAX_HEADER_BYTES))

        return await self._read(work)

    async def fork(self, source_id: str, entry: Entry) -> Entry | None:
        def work(db: sqlite3.Connection) -> Entry | None:
            source = _checkpoint(db, source_id, entry.turn)
            if source is None:
                return None
            number, num_tokens = source
            copy = insert_entry(db, entry)
            db.execute("UPDATE entries SET num_tokens = ? WHERE number = ?", [num_tokens, copy])
            db.execute(
                """INSERT INTO checkpoints
                (entry_number, turn, num_tokens, created_at, state_id, num_bytes, blob)
                SELECT ?, turn, num_tokens, ?, state_id, num_bytes, blob FROM checkpoints
                WHERE entry_number = ? AND turn = ?""",
                [copy, entry.created_at, number, entry.turn],
            )
            return find_entry(db, entry.id)

        return await self._run(work)

    async def rewind(self, entry_id: str, turn: int, now: float) -> Entry | None:
        def work(db: sqlite3.Connection) -> Entry | None:
            target, entry = _checkpoint(db, entry_id, turn), find_entry(db, entry_id)
            if target is None or entry is None:
                return None
            number, num_tokens = target
            used = entry.used(now)
            db.execute(
                "DELETE FROM checkpoints WHERE entry_number = ? AND turn > ?", [number, turn]
            )
            db.execute(
                """UPDATE entries SET turn = ?, num_tokens = ?, last_used_at = ?, expires_at = ?
                WHERE number = ?""",
                [turn, num_tokens, used.last_used_at, used.expires_at, number],
            )
            return find_entry(db, entry_id)

        return await self._run(work)

    async def expired(self, now: float, limit: int) -> Sequence[Entry]:
        def work(db: sqlite3.Connection) -> Sequence[Entry]:
            rows = db.execute(
                f"""SELECT {ENTRY} FROM entries WHERE expires_at IS NOT NULL AND expires_at <= ?
                ORDER BY expires_at LIMIT ?""",
                [now, limit],
            )
            return [entry_of(row) for row in rows]

        return await self._read(work)

    async def delete(self, kind: EntryKind, entry_id: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            deleted = db.execute("DELETE FROM entries WHERE id = ? AND kind = ?", [entry_id, kind])
            return deleted.rowcount > 0

        try:
            return await self._run(work, erases=True)
        except StorageFull:  # the log has no space for all of it at once
            pass
        for value in await self._run(lambda db: values_of(db, kind, entry_id)):
            for start in range(0, value.num_bytes, PIECE_BYTES):
                await self._run(partial(overwrite, value, start), erases=True)
        while await self._run(partial(delete_oldest_state, kind, entry_id), erases=True):
            pass
        return await self._run(overwritten(work), erases=True)

    async def close(self) -> None:
        """Finish what was asked for and close the file."""
        await self._readers.close()
        await self._writer.close()
        for threads in (self._writing, self._reading):
            await asyncio.to_thread(threads.shutdown)
        while self._locked:
            os.close(self._locked.pop())

    def _look(self) -> StoreHealth:
        fault, num_bytes = self._opened.fault, self._files.num_bytes
        disk_bytes = free_bytes = 0
        try:
            databases = (self._path.with_name(self._path.name + end) for end in DATABASE_FILES)
            num_bytes += sum(path.stat().st_size for path in databases if path.exists())
            disk_bytes, free_bytes = self._opened.disk_bytes, self._opened.free_bytes
        except OSError as error:
            fault = fault or str(error)
        # States in files need no pages of the database.
        unused_bytes = 0 if self._files.num_bytes else self._writer.unused_bytes
        return StoreHealth(num_bytes, free_bytes, unused_bytes, disk_bytes, fault)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        await self._writer.settle()
        return await self._readers.run(work)

    async def _write(
        self, work: Callable[[sqlite3.Connection], bool], state: NewState | None
    ) -> bool:
        """Run the work, which includes the state; a large state is written to its file first."""
        if state is None or len(state.blob) < LARGE_BYTES:
            return await self._run(work)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writing, self._files.write, state.id, state.blob)
        except (OSError, RuntimeError) as error:  # RuntimeError: the store is closed
            raise storage_error(error) from error
        return await self._run(work, file=state.id)

    async def _read_file(self, state_id: str) -> bytes | None:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reading, self._files.read, state_id)
        except OSError as error:
            raise storage_error(error) from error


def states_folder(path: Path) -> Path:
    """The folder of large states, next to the database."""
    return path.with_name(f"{path.name}-states")


def _latest_use(db: sqlite3.Connection) -> float:
    """Unix seconds; 0 for an empty store."""
    [latest] = db.execute("SELECT coalesce(max(last_used_at), 0) FROM entries").fetchone()
    return float(latest)


def _sweep(db: sqlite3.Connection, files: StateFiles) -> None:
    """Delete files without a checkpoint, which only a crash leaves.

    An index can be damaged and still be readable, so the table is read. Raises OSError.
    """
    left_over = files.names()
    for source in ("checkpoints", "checkpoints NOT INDEXED"):
        if left_over:
            rows = db.execute(f"SELECT state_id FROM {source} WHERE blob IS NULL")
            left_over -= {state_id for (state_id,) in rows}
    for name in left_over:
        files.delete(name)


def _add_checkpoint(db: sqlite3.Connection, number: int, entry: Entry, state: NewState) -> None:
    blob = state.blob if len(state.blob) < LARGE_BYTES else None
    db.execute(
        """INSERT INTO checkpoints
        (entry_number, turn, num_tokens, created_at, state_id, num_bytes, blob)
        VALUES (?, ?, ?, ?, ?, ?, ?)""",
        [
            *(number, entry.turn, entry.num_tokens, entry.last_used_at),
            *(state.id, len(state.blob), blob),
        ],
    )
    if (kept := state.answer) is not None:
        db.execute(
            """INSERT INTO answers (entry_number, turn, key, request, num_bytes, answer)
            VALUES (?, ?, ?, ?, ?, ?)""",
            [number, entry.turn, kept.key, kept.request, len(kept.answer.encode()), kept.answer],
        )


def _checkpoint(db: sqlite3.Connection, entry_id: str, turn: int) -> tuple[int, int] | None:
    """The entry's number, and its tokens after this turn; turn 0 of a session always exists."""
    row = db.execute(
        """SELECT number, CASE WHEN ?2 = 0 AND kind = 'session' THEN 0 ELSE
        (SELECT num_tokens FROM checkpoints WHERE entry_number = number AND turn = ?2) END
        FROM entries WHERE id = ?1""",
        [entry_id, turn],
    ).fetchone()
    return None if row is None or row[1] is None else (int(row[0]), int(row[1]))
