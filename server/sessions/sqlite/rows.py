"""Entries as table rows."""

import json
import sqlite3
from typing import Any

from server.sessions.store import Entry

COLUMNS = (
    "kind, id, owner, created_at, last_used_at, turn, num_tokens, ttl_s, expires_at, parent_id, "
    "parent_turn, status, metadata, body"
)
ENTRY = f"""{COLUMNS},
    (SELECT count(*) FROM checkpoints WHERE entry_number = number) AS num_checkpoints,
    (SELECT state_id FROM checkpoints
    WHERE entry_number = number AND checkpoints.turn = entries.turn) AS state_id"""


def insert_entry(db: sqlite3.Connection, entry: Entry) -> int:
    """Add an entry, without a checkpoint. Returns its number."""
    values = (
        *(entry.kind, entry.id, entry.owner, entry.created_at, entry.last_used_at, entry.turn),
        *(entry.num_tokens, entry.ttl_s, entry.expires_at, entry.parent_id, entry.parent_turn),
        *(entry.status, json.dumps(entry.metadata), entry.body, entry.num_bytes),
    )
    places = ", ".join("?" * len(values))
    [number] = db.execute(
        f"INSERT INTO entries ({COLUMNS}, num_bytes) VALUES ({places}) RETURNING number", values
    ).fetchone()
    return int(number)


def find_entry(db: sqlite3.Connection, entry_id: str) -> Entry | None:
    row = db.execute(f"SELECT {ENTRY} FROM entries WHERE id = ?", [entry_id]).fetchone()
    return None if row is None else entry_of(row)


def entry_of(row: tuple[Any, ...]) -> Entry:
    kind, entry_id, owner, created_at, last_used_at, turn, num_tokens, *rest = row
    ttl_s, expires_at, parent_id, parent_turn, status, metadata, body, *kept = rest
    num_checkpoints, state_id = kept
    return Entry(
        kind=kind,
        id=entry_id,
        owner=owner,
        created_at=created_at,
        last_used_at=last_used_at,
        turn=turn,
        num_tokens=num_tokens,
        state_id=state_id,
        num_checkpoints=num_checkpoints,
        ttl_s=ttl_s,
        expires_at=expires_at,
        parent_id=parent_id,
        parent_turn=parent_turn,
        metadata=json.loads(metadata),
        status=status,
        body=body,
    )
