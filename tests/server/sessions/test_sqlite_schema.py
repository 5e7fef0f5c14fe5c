"""A store of an earlier version is brought to the present one, wholly or not at all."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from server.sessions.sqlite import schema
from server.sessions.sqlite.schema import SCHEMA_VERSION
from server.sessions.store import SessionRecord, Usage
from tests.server.sessions.stores import FILE, blob_of, commit, listed, opened, raw, refusal

VERSION_1 = """
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at REAL NOT NULL,
    last_used_at REAL NOT NULL, turn INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob(4096)), metadata TEXT NOT NULL
) STRICT;
CREATE TABLE checkpoints (
    session_number INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE,
    turn INTEGER NOT NULL, num_tokens INTEGER NOT NULL, num_bytes INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob(4096)), blob BLOB NOT NULL,
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
INSERT INTO sessions (number, id, created_at, last_used_at, turn, num_tokens, metadata) VALUES
    (3, 'a', 10.0, 20.0, 2, 200, '{"k": "v"}'), (7, 'b', 30.0, 30.0, 0, 0, '{}');
INSERT INTO checkpoints (session_number, turn, num_tokens, num_bytes, blob)
    VALUES (3, 2, 200, 6, x'617374617465');
PRAGMA application_id = 0x6C746E64;
PRAGMA user_version = 1;
"""


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """Folder of a store as version 1 wrote it."""
    db = sqlite3.connect(tmp_path / FILE)
    db.executescript(VERSION_1)
    db.close()
    return tmp_path


def test_a_store_of_version_1_goes_on(old_store: Path) -> None:
    async def main() -> None:
        for _ in range(2):
            async with opened(old_store) as store:
                a = SessionRecord("a", 10.0, 20.0, "", 2, 200, 1, metadata={"k": "v"})
                assert await listed(store) == [SessionRecord("b", 30.0, 30.0), a]
                assert await blob_of(store, "a") == b"astate"
                assert [c.created_at for c in await store.checkpoints("a")] == [20.0]
                assert store.total == Usage(2, 1, 6)
        async with opened(old_store) as store:
            await commit(store, "a", 3, b"next", keep=8)
            await commit(store, "b", 1, b"first", keep=8)
            assert store.total == Usage(2, 3, 6 + 4 + 5)
            await store.delete("a")
            assert b"astate" not in raw(old_store)
        db = sqlite3.connect(old_store / FILE)
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        assert not names & {"totals", "added", "removed", "old_sessions", "old_checkpoints"}
        db.close()

    asyncio.run(main())


def test_a_migration_that_fails_changes_nothing(
    old_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables() -> list[str]:
        db = sqlite3.connect(old_store / FILE)
        found = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema ORDER BY name")]
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        db.close()
        return found

    before = tables()
    broken = schema.MIGRATIONS[1] + "INSERT INTO nowhere VALUES (1);"
    monkeypatch.setitem(schema.MIGRATIONS, 1, broken)
    assert "nowhere" in refusal(old_store / FILE)
    assert tables() == before
    monkeypatch.undo()
    test_a_store_of_version_1_goes_on(old_store)


def test_every_earlier_version_can_be_migrated() -> None:
    assert sorted(schema.MIGRATIONS) == list(range(SCHEMA_VERSION))
