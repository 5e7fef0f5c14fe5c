"""Sessions as rows of their table."""

import json
import sqlite3
from typing import Any

from server.sessions.store import SessionRecord

COLUMNS = (
    "id, created_at, last_used_at, owner, turn, num_tokens, ttl_s, parent_id, parent_turn, metadata"
)
SESSION = f"""{COLUMNS},
    (SELECT count(*) FROM checkpoints WHERE session_number = number) AS num_checkpoints"""


def insert_session(
    db: sqlite3.Connection, record: SessionRecord, num_tokens: int | None = None
) -> int:
    """Add a session, without a checkpoint. Returns its number."""
    values = (
        *(record.id, record.created_at, record.last_used_at, record.owner, record.turn),
        *(record.num_tokens if num_tokens is None else num_tokens, record.ttl_s),
        *(record.parent_id, record.parent_turn, json.dumps(record.metadata)),
    )
    places = ", ".join("?" * len(values))
    [number] = db.execute(
        f"INSERT INTO sessions ({COLUMNS}) VALUES ({places}) RETURNING number", values
    ).fetchone()
    return int(number)


def find_session(db: sqlite3.Connection, session_id: str) -> SessionRecord | None:
    row = db.execute(f"SELECT {SESSION} FROM sessions WHERE id = ?", [session_id]).fetchone()
    return None if row is None else session_of(row)


def session_of(row: tuple[Any, ...]) -> SessionRecord:
    session_id, created_at, last_used_at, owner, turn, num_tokens, *rest = row
    ttl_s, parent_id, parent_turn, metadata, num_checkpoints = rest
    return SessionRecord(
        id=session_id,
        created_at=created_at,
        last_used_at=last_used_at,
        owner=owner,
        turn=turn,
        num_tokens=num_tokens,
        num_checkpoints=num_checkpoints,
        ttl_s=ttl_s,
        parent_id=parent_id,
        parent_turn=parent_turn,
        metadata=json.loads(metadata),
    )
