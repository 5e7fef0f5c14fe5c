"""The embedded session store: one SQLite file, written by one thread."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from server.errors import StorageFailed
from server.sessions.sqlite.responses import SQLiteResponses
from server.sessions.sqlite.rows import SESSION, find_session, insert_session, session_of
from server.sessions.sqlite.schema import Durability, open_store
from server.sessions.sqlite.writer import Writer
from server.sessions.store import CheckpointRecord, KeptAnswer, SessionRecord, Turn, Usage


class SQLiteStore:
    """A SessionStore in one file; `-wal` beside it belongs to it while the store is open.

    With `durability` async a commit does not wait for the disk: it survives the end of the process,
    but the last ones may be lost when the machine loses its power.
    """

    def __init__(self, path: Path, durability: Durability = "sync") -> None:
        """Open or create. Raises StoreError for a file that this server cannot use."""
        self._writer = Writer(open_store(path, durability))
        self._run = self._writer.run
        self.responses = SQLiteResponses(self._writer)

    @property
    def total(self) -> Usage:
        return self._writer.total

    async def create(self, record: SessionRecord, blob: bytes | None = None) -> None:
        def work(db: sqlite3.Connection) -> None:
            number = insert_session(db, record)
            if blob is not None:
                turn = Turn(record.turn, record.num_tokens, record.created_at, blob)
                _add_checkpoint(db, number, turn)

        await self._run(work)

    async def get(self, session_id: str) -> SessionRecord | None:
        return await self._run(lambda db: find_session(db, session_id))

    async def list(
        self, owner: str, limit: int, after: str | None, now: float
    ) -> list[SessionRecord]:
        def work(db: sqlite3.Connection) -> list[SessionRecord]:
            rows = db.execute(
                f"""SELECT {SESSION} FROM sessions WHERE owner = ?1
                AND (?2 IS NULL OR number < (SELECT number FROM sessions WHERE id = ?2))
                AND (ttl_s IS NULL OR last_used_at + ttl_s > ?3)
                ORDER BY number DESC LIMIT ?4""",
                [owner, after, now, limit],
            )
            return [session_of(row) for row in rows]

        return await self._run(work)

    async def usage(self, owner: str) -> Usage:
        def work(db: sqlite3.Connection) -> Usage:
            row = db.execute(
                """SELECT num_sessions, num_states, num_bytes, num_responses FROM owners
                WHERE owner = ?""",
                [owner],
            ).fetchone()
            return Usage() if row is None else Usage(*row)

        return await self._run(work)

    async def checkpoints(self, session_id: str) -> Sequence[CheckpointRecord]:
        def work(db: sqlite3.Connection) -> Sequence[CheckpointRecord]:
            rows = db.execute(
                """SELECT turn, num_tokens, created_at, num_bytes FROM checkpoints
                WHERE session_number = (SELECT number FROM sessions WHERE id = ?)
                ORDER BY turn DESC""",
                [session_id],
            )
            return [CheckpointRecord(*row) for row in rows]

        return await self._run(work)

    async def commit(self, session_id: str, turn: Turn, keep: int) -> None:
        def work(db: sqlite3.Connection) -> None:
            updated = db.execute(
                """UPDATE sessions SET turn = ?1, num_tokens = ?2, last_used_at = ?3
                WHERE id = ?4 AND turn = ?1 - 1 RETURNING number""",
                [turn.turn, turn.num_tokens, turn.created_at, session_id],
            ).fetchone()
            if updated is None:
                raise StorageFailed(f"session {session_id} is not at turn {turn.turn - 1} any more")
            [number] = updated
            db.execute(
                "DELETE FROM checkpoints WHERE session_number = ? AND turn <= ?",
                [number, turn.turn - keep],
            )  # first: their pages are taken for the new one
            _add_checkpoint(db, number, turn)

        await self._run(work)

    async def find_answer(self, session_id: str, key: str) -> KeptAnswer | None:
        def work(db: sqlite3.Connection) -> KeptAnswer | None:
            row = db.execute(
                """SELECT key, request, answer FROM answers
                WHERE session_number = (SELECT number FROM sessions WHERE id = ?) AND key = ?""",
                [session_id, key],
            ).fetchone()
            return None if row is None else KeptAnswer(*row)

        return await self._run(work)

    async def load_blob(self, session_id: str, turn: int) -> bytes | None:
        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute(
                """SELECT blob FROM checkpoints
                WHERE session_number = (SELECT number FROM sessions WHERE id = ?) AND turn = ?""",
                [session_id, turn],
            ).fetchone()
            return None if row is None else bytes(row[0])

        return await self._run(work)

    async def fork(self, session_id: str, record: SessionRecord) -> SessionRecord | None:
        def work(db: sqlite3.Connection) -> SessionRecord | None:
            source = _checkpoint(db, session_id, record.turn)
            if source is None:
                return None
            number, num_tokens = source
            copy = insert_session(db, record, num_tokens)
            db.execute(
                """INSERT INTO checkpoints
                (session_number, turn, num_tokens, created_at, num_bytes, blob)
                SELECT ?, turn, num_tokens, ?, num_bytes, blob FROM checkpoints
                WHERE session_number = ? AND turn = ?""",
                [copy, record.created_at, number, record.turn],
            )
            return find_session(db, record.id)

        return await self._run(work)

    async def rewind(self, session_id: str, turn: int, used_at: float) -> SessionRecord | None:
        def work(db: sqlite3.Connection) -> SessionRecord | None:
            target = _checkpoint(db, session_id, turn)
            if target is None:
                return None
            number, num_tokens = target
            db.execute(
                "UPDATE sessions SET turn = ?, num_tokens = ?, last_used_at = ? WHERE number = ?",
                [turn, num_tokens, used_at, number],
            )
            db.execute(
                "DELETE FROM checkpoints WHERE session_number = ? AND turn > ?", [number, turn]
            )
            return find_session(db, session_id)

        return await self._run(work)

    async def expired(self, now: float, limit: int) -> Sequence[str]:
        def work(db: sqlite3.Connection) -> Sequence[str]:
            rows = db.execute(
                """SELECT id FROM sessions WHERE ttl_s IS NOT NULL AND last_used_at + ttl_s <= ?
                ORDER BY last_used_at + ttl_s LIMIT ?""",
                [now, limit],
            )
            return [str(session_id) for (session_id,) in rows]

        return await self._run(work)

    async def delete(self, session_id: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM sessions WHERE id = ?", [session_id]).rowcount > 0

        return await self._run(work, erases=True)

    async def close(self) -> None:
        """Finish what was asked for and close the file."""
        await self._writer.close()


def _add_checkpoint(db: sqlite3.Connection, number: int, turn: Turn) -> None:
    db.execute(
        """INSERT INTO checkpoints (session_number, turn, num_tokens, created_at, num_bytes, blob)
        VALUES (?, ?, ?, ?, ?, ?)""",
        [number, turn.turn, turn.num_tokens, turn.created_at, len(turn.blob), turn.blob],
    )
    if (kept := turn.answer) is not None:
        db.execute(
            """INSERT INTO answers (session_number, turn, key, request, num_bytes, answer)
            VALUES (?, ?, ?, ?, ?, ?)""",
            [number, turn.turn, kept.key, kept.request, len(kept.answer.encode()), kept.answer],
        )


def _checkpoint(db: sqlite3.Connection, session_id: str, turn: int) -> tuple[int, int] | None:
    """Number of the session and tokens after this turn; turn 0 is always there."""
    row = db.execute(
        """SELECT number, CASE WHEN ?2 = 0 THEN 0 ELSE
        (SELECT num_tokens FROM checkpoints WHERE session_number = number AND turn = ?2) END
        FROM sessions WHERE id = ?1""",
        [session_id, turn],
    ).fetchone()
    return None if row is None or row[1] is None else (int(row[0]), int(row[1]))
