"""Stored responses in the file of the sessions, under the same writer and accounts."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from server.sessions.sqlite.rows import find_session, insert_session
from server.sessions.sqlite.writer import Writer
from server.sessions.store import ResponseRecord, SessionRecord

RECORD = "id, owner, created_at, expires_at, status, body, num_tokens, blob IS NOT NULL"
UNFINISHED = "status IN ('queued', 'in_progress')"


class SQLiteResponses:
    """A ResponseStore."""

    def __init__(self, writer: Writer) -> None:
        self._run = writer.run

    async def insert(self, record: ResponseRecord, blob: bytes | None = None) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(
                """INSERT INTO responses
                (id, owner, created_at, expires_at, status, num_tokens, num_bytes, body, blob)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                [
                    *(record.id, record.owner, record.created_at, record.expires_at),
                    *(record.status, record.num_tokens, _num_bytes(record, blob)),
                    *(record.body, blob),
                ],
            )

        await self._run(work)

    async def finish(self, record: ResponseRecord, blob: bytes | None = None) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            return _update(db, record, blob)

        return await self._run(work)

    async def rewrite_unfinished(
        self, rewrite: Callable[[ResponseRecord], ResponseRecord], but: frozenset[str]
    ) -> int:
        def work(db: sqlite3.Connection) -> int:
            rows = db.execute(f"SELECT {RECORD} FROM responses WHERE {UNFINISHED}").fetchall()
            found = [_record(row) for row in rows if row[0] not in but]
            for record in found:
                _update(db, rewrite(record), None)
            return len(found)

        return await self._run(work)

    async def get(self, response_id: str) -> ResponseRecord | None:
        def work(db: sqlite3.Connection) -> ResponseRecord | None:
            row = db.execute(
                f"SELECT {RECORD} FROM responses WHERE id = ?", [response_id]
            ).fetchone()
            return None if row is None else _record(row)

        return await self._run(work)

    async def load_blob(self, response_id: str) -> bytes | None:
        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT blob FROM responses WHERE id = ?", [response_id]).fetchone()
            return None if row is None or row[0] is None else bytes(row[0])

        return await self._run(work)

    async def copy_to_session(
        self, response_id: str, record: SessionRecord
    ) -> SessionRecord | None:
        def work(db: sqlite3.Connection) -> SessionRecord | None:
            row = db.execute(
                "SELECT number, num_tokens FROM responses WHERE id = ? AND blob IS NOT NULL",
                [response_id],
            ).fetchone()
            if row is None:
                return None
            number, num_tokens = row
            session = insert_session(db, record, num_tokens)
            db.execute(
                """INSERT INTO checkpoints
                (session_number, turn, num_tokens, created_at, num_bytes, blob)
                SELECT ?, ?, num_tokens, ?, length(blob), blob FROM responses WHERE number = ?""",
                [session, record.turn, record.created_at, number],
            )
            return find_session(db, record.id)

        return await self._run(work)

    async def expired(self, now: float, limit: int) -> Sequence[str]:
        def work(db: sqlite3.Connection) -> Sequence[str]:
            rows = db.execute(
                """SELECT id FROM responses WHERE expires_at IS NOT NULL AND expires_at <= ?
                ORDER BY expires_at LIMIT ?""",
                [now, limit],
            )
            return [str(response_id) for (response_id,) in rows]

        return await self._run(work)

    async def delete(self, response_id: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM responses WHERE id = ?", [response_id]).rowcount > 0

        return await self._run(work, erases=True)


def _update(db: sqlite3.Connection, record: ResponseRecord, blob: bytes | None) -> bool:
    updated = db.execute(
        f"""UPDATE responses SET status = ?, num_tokens = ?, num_bytes = ?, body = ?, blob = ?
        WHERE id = ? AND {UNFINISHED}""",
        [
            *(record.status, record.num_tokens, _num_bytes(record, blob), record.body, blob),
            record.id,
        ],
    )
    return updated.rowcount > 0


def _num_bytes(record: ResponseRecord, blob: bytes | None) -> int:
    return len(record.body.encode()) + len(blob or b"")


def _record(row: tuple[Any, ...]) -> ResponseRecord:
    response_id, owner, created_at, expires_at, status, body, num_tokens, has_state = row
    return ResponseRecord(
        id=response_id,
        owner=owner,
        created_at=created_at,
        expires_at=expires_at,
        status=status,
        body=body,
        num_tokens=num_tokens,
        has_state=bool(has_state),
    )
