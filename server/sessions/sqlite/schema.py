"""The tables of the embedded store, and opening its file."""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

from server.sessions.store import StoreError

Durability = Literal["sync", "async"]

BUSY_S = 30.0
"""How long one connection waits for another of the same process: for a short read or commit."""

APPLICATION_ID = 0x6C746E64
SCHEMA_VERSION = 4
PAGE_BYTES = 16384
"""Large, as blobs are, which halves the time of a commit.

When SQLite balances its trees it moves the first bytes of rows, and leaves copies that no delete
finds. After padding of a page, metadata, body, blob and answer lie in overflow pages, which do not
move until secure_delete zeroes them.
"""

PADDING = f"padding BLOB NOT NULL DEFAULT (zeroblob({PAGE_BYTES}))"

TABLES = f"""
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used_at REAL NOT NULL,
    turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    ttl_s REAL,
    expires_at REAL,
    parent_id TEXT,
    parent_turn INTEGER,
    status TEXT,
    num_bytes INTEGER NOT NULL,
    {PADDING},
    metadata TEXT NOT NULL,
    body TEXT
) STRICT;
CREATE INDEX entries_by_owner ON entries (kind, owner, number);
CREATE INDEX entries_by_expiry ON entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX unfinished_entries ON entries (status) WHERE status IN ('queued', 'in_progress');

CREATE TABLE checkpoints (
    entry_number INTEGER NOT NULL REFERENCES entries (number),
    turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    created_at REAL NOT NULL,
    state_id TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    {PADDING},
    blob BLOB,
    PRIMARY KEY (entry_number, turn)
) STRICT;
CREATE INDEX checkpoints_in_files ON checkpoints (state_id) WHERE blob IS NULL;

CREATE TABLE answers (
    entry_number INTEGER NOT NULL,
    turn INTEGER NOT NULL,
    key TEXT NOT NULL,
    request TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    {PADDING},
    answer TEXT NOT NULL,
    PRIMARY KEY (entry_number, turn),
    UNIQUE (entry_number, key),
    FOREIGN KEY (entry_number, turn) REFERENCES checkpoints (entry_number, turn)
) STRICT;

CREATE TABLE owners (
    owner TEXT PRIMARY KEY,
    num_sessions INTEGER NOT NULL,
    num_responses INTEGER NOT NULL,
    num_states INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN
    INSERT INTO owners
    VALUES (NEW.owner, NEW.kind = 'session', NEW.kind = 'response', 0, NEW.num_bytes)
    ON CONFLICT DO UPDATE SET num_sessions = num_sessions + excluded.num_sessions,
    num_responses = num_responses + excluded.num_responses,
    num_bytes = num_bytes + excluded.num_bytes;
END;
CREATE TRIGGER entry_changed AFTER UPDATE OF num_bytes ON entries BEGIN
    UPDATE owners SET num_bytes = num_bytes - OLD.num_bytes + NEW.num_bytes
    WHERE owner = NEW.owner;
END;
CREATE TRIGGER entry_removed BEFORE DELETE ON entries BEGIN
    DELETE FROM checkpoints WHERE entry_number = OLD.number;
    UPDATE owners SET num_sessions = num_sessions - (OLD.kind = 'session'),
    num_responses = num_responses - (OLD.kind = 'response'),
    num_bytes = num_bytes - OLD.num_bytes WHERE owner = OLD.owner;
END;
CREATE TRIGGER checkpoint_added AFTER INSERT ON checkpoints BEGIN
    UPDATE owners SET num_states = num_states + 1, num_bytes = num_bytes + NEW.num_bytes
    WHERE owner = (SELECT owner FROM entries WHERE number = NEW.entry_number);
END;
CREATE TRIGGER checkpoint_removed BEFORE DELETE ON checkpoints BEGIN
    DELETE FROM answers WHERE entry_number = OLD.entry_number AND turn = OLD.turn;
    UPDATE owners SET num_states = num_states - 1, num_bytes = num_bytes - OLD.num_bytes
    WHERE owner = (SELECT owner FROM entries WHERE number = OLD.entry_number);
END;
CREATE TRIGGER answer_added AFTER INSERT ON answers BEGIN
    UPDATE owners SET num_bytes = num_bytes + NEW.num_bytes
    WHERE owner = (SELECT owner FROM entries WHERE number = NEW.entry_number);
END;
CREATE TRIGGER answer_removed BEFORE DELETE ON answers BEGIN
    UPDATE owners SET num_bytes = num_bytes - OLD.num_bytes
    WHERE owner = (SELECT owner FROM entries WHERE number = OLD.entry_number);
END;
"""

FILES_TO_DELETE = """
CREATE TEMP TABLE files_to_delete (state_id TEXT PRIMARY KEY) STRICT;
CREATE TEMP TRIGGER file_state_removed AFTER DELETE ON main.checkpoints WHEN OLD.blob IS NULL
BEGIN INSERT OR IGNORE INTO files_to_delete VALUES (OLD.state_id); END;
"""
"""Files of states that lost a checkpoint; those without another one are deleted after the
commit."""


def open_store(path: Path, durability: Durability) -> sqlite3.Connection:
    """Open or create the database, locked for this process. Raises StoreError."""
    db = None
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        # Only for a new file: closing one drops all of this process's locks on it.
        with suppress(OSError):  # SQLite will report the reason
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        is_own = os.access in os.supports_effective_ids
        if path.exists() and not os.access(path, os.W_OK, effective_ids=is_own):
            raise StoreError(f"{path}: attempt to write a readonly database")
        db = connect(path, timeout_s=0)
        is_new = _is_new(db, path)
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if durability == 'sync' else 'NORMAL'}")
        db.execute("PRAGMA secure_delete = ON")
        if is_new:
            db.executescript(
                f"""BEGIN IMMEDIATE;
                {TABLES}
                PRAGMA application_id = {APPLICATION_ID};
                PRAGMA user_version = {SCHEMA_VERSION};
                COMMIT;
                PRAGMA wal_checkpoint(TRUNCATE);"""
            )
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
        for private in (path, path.with_name(f"{path.name}-wal")):
            private.chmod(0o600)  # new stores have this mode from the start
        _check_accounts(db)
        db.executescript(FILES_TO_DELETE)
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")
    except (sqlite3.Error, OSError, StoreError, TypeError, ValueError) as error:
        if db is not None:
            db.close()
        raise StoreError(reason(path, error)) from error
    return db


def connect(path: Path, timeout_s: float = BUSY_S) -> sqlite3.Connection:
    """One of a process's connections to a database, which no other process can use meanwhile.

    What they share is in the process's memory: it takes no space on the disk. Raises sqlite3.Error.
    """
    uri = f"{path.absolute().as_uri()}?vfs=unix-excl"
    db = sqlite3.connect(uri, timeout_s, isolation_level=None, check_same_thread=False, uri=True)
    db.execute("PRAGMA temp_store = MEMORY")
    return db


def check_store(path: Path) -> None:
    """Raises StoreError for a database that is damaged or of another version."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            if _is_new(db, path):
                raise StoreError(f"{path}: it has no tables")
            [found, *_] = db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise ValueError(found)
            _check_accounts(db)
    except (sqlite3.Error, TypeError, ValueError, StoreError) as error:
        raise StoreError(reason(path, error)) from error


def one_line(error: Exception) -> str:
    """The error in one line: SQLite quotes what it cannot read."""
    return " ".join(str(error).split())[:200]


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has no tables yet. Raises StoreError for another version."""
    application_id = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    is_empty = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if is_empty and application_id == 0:
        return True
    if application_id != APPLICATION_ID:
        raise StoreError(f"{path}: not a latentd session store")
    if version != SCHEMA_VERSION:
        raise StoreError(f"{path}: store version {version}, this latentd uses {SCHEMA_VERSION}")
    return False


def _check_accounts(db: sqlite3.Connection) -> None:
    """Raises ValueError if the owners' accounts do not match the tables."""
    counts = {
        "sessions": "SELECT count(*) FROM entries WHERE kind = 'session'",
        "responses": "SELECT count(*) FROM entries WHERE kind = 'response'",
        "states": "SELECT count(*) FROM checkpoints",
    }
    for what, count in counts.items():
        [counted] = db.execute(count).fetchone()
        [noted] = db.execute(f"SELECT coalesce(sum(num_{what}), 0) FROM owners").fetchone()
        if counted != noted:
            raise ValueError(f"it has {counted} {what}, but its accounts say {noted}")


def reason(path: Path, error: Exception) -> str:
    """Why the store cannot be opened, in one line."""
    code = getattr(error, "sqlite_errorcode", None)
    match code:
        case _ if code == sqlite3.SQLITE_BUSY or isinstance(error, BlockingIOError):
            return f"{path}: in use by another latentd server"
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return f"{path}: damaged, or not a latentd session store ({one_line(error)})"
        case _ if isinstance(error, TypeError | ValueError):  # a value of a type we never write
            return f"{path}: damaged ({one_line(error)})"
        case _:
            return str(error) if isinstance(error, StoreError) else f"{path}: {one_line(error)}"
