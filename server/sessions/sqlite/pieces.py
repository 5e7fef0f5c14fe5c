"""Deleting an entry piece by piece, where the log has no space for all of it.

SQLite puts every page that a delete frees into the log, with zeros. So the values are overwritten
first, a piece at a time, and rows go whose pages need not be written any more. A crash meanwhile
leaves an entry with blank values.
"""

import sqlite3
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from server.sessions.store import EntryKind

PIECE_BYTES = 512 << 10
"""Of a value, overwritten in one transaction."""

VALUES = (
    ("checkpoints", "entry_number", "blob"),
    ("answers", "entry_number", "answer"),
    ("entries", "number", "metadata"),
    ("entries", "number", "body"),
)
"""Tables, the columns of the entry's number, and those of values that may be long."""

T = TypeVar("T")


class Value(NamedTuple):
    """A value of an entry."""

    table: str
    column: str
    row: int
    num_bytes: int


def values_of(db: sqlite3.Connection, kind: EntryKind, entry_id: str) -> list[Value]:
    """All that may be long."""
    found = list[Value]()
    for table, number, column in VALUES:
        rows = db.execute(
            f"""SELECT rowid FROM {table} WHERE {column} IS NOT NULL AND {number} =
            (SELECT number FROM entries WHERE id = ? AND kind = ?)""",
            [entry_id, kind],
        ).fetchall()
        for (row,) in rows:
            with db.blobopen(table, column, row, readonly=True) as value:
                found.append(Value(table, column, row, len(value)))
    return found


def overwrite(value: Value, start: int, db: sqlite3.Connection) -> None:
    """A piece of a value that may have gone. Metadata stay metadata."""
    exists = f"SELECT 1 FROM {value.table} WHERE rowid = ? AND {value.column} IS NOT NULL"
    if db.execute(exists, [value.row]).fetchone() is None:
        return
    blank = b"{}" if value.column == "metadata" and not start else b""
    with db.blobopen(value.table, value.column, value.row) as written:
        written.seek(start)
        written.write(blank.ljust(min(PIECE_BYTES, len(written) - start)))


def delete_oldest_state(kind: EntryKind, entry_id: str, db: sqlite3.Connection) -> bool:
    """A checkpoint whose values are blank, with its answer. False if there is none."""

    def work(db: sqlite3.Connection) -> bool:
        deleted = db.execute(
            """DELETE FROM checkpoints WHERE rowid = (
            SELECT checkpoints.rowid FROM entries JOIN checkpoints ON entry_number = number
            WHERE id = ? AND kind = ? ORDER BY checkpoints.turn LIMIT 1)""",
            [entry_id, kind],
        )
        return deleted.rowcount > 0

    return overwritten(work)(db)


def overwritten(work: Callable[[sqlite3.Connection], T]) -> Callable[[sqlite3.Connection], T]:
    """Work that deletes blank values: pages that it frees are not written."""

    def run(db: sqlite3.Connection) -> T:
        db.execute("PRAGMA secure_delete = FAST")
        try:
            return work(db)
        finally:
            db.execute("PRAGMA secure_delete = ON")

    return run
