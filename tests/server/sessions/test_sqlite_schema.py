"""A store of an earlier version is brought to the present one, wholly or not at all."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from server.sessions.sqlite import schema
from server.sessions.sqlite.schema import SCHEMA_VERSION
from server.sessions.store import KeptAnswer, ResponseRecord, SessionRecord, Usage
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

VERSION_2 = """
PRAGMA page_size = 16384;
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    created_at REAL NOT NULL, last_used_at REAL NOT NULL, ttl_s REAL, turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, parent_id TEXT, parent_turn INTEGER,
    padding BLOB NOT NULL DEFAULT (zeroblob(16384)), metadata TEXT NOT NULL
) STRICT;
CREATE INDEX sessions_by_owner ON sessions (owner, number);
CREATE INDEX sessions_by_expiry ON sessions (last_used_at + ttl_s) WHERE ttl_s IS NOT NULL;
CREATE TABLE checkpoints (
    session_number INTEGER NOT NULL REFERENCES sessions (number), turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, created_at REAL NOT NULL, num_bytes INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob(16384)), blob BLOB NOT NULL,
    PRIMARY KEY (session_number, turn)
) STRICT;
CREATE TABLE answers (
    session_number INTEGER NOT NULL, turn INTEGER NOT NULL, key TEXT NOT NULL,
    request TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    padding BLOB NOT NULL DEFAULT (zeroblob(16384)), answer TEXT NOT NULL,
    PRIMARY KEY (session_number, turn), UNIQUE (session_number, key),
    FOREIGN KEY (session_number, turn) REFERENCES checkpoints (session_number, turn)
) STRICT;
CREATE TABLE owners (
    owner TEXT PRIMARY KEY, num_sessions INTEGER NOT NULL, num_states INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TRIGGER session_added AFTER INSERT ON sessions BEGIN
    INSERT INTO owners VALUES (NEW.owner, 1, 0, 0)
    ON CONFLICT DO UPDATE SET num_sessions = num_sessions + 1;
END;
CREATE TRIGGER session_removed BEFORE DELETE ON sessions BEGIN
    DELETE FROM checkpoints WHERE session_number = OLD.number;
    UPDATE owners SET num_sessions = num_sessions - 1 WHERE owner = OLD.owner;
END;
CREATE TRIGGER checkpoint_added AFTER INSERT ON checkpoints BEGIN
    UPDATE owners SET num_states = num_states + 1, num_bytes = num_bytes + NEW.num_bytes
    WHERE owner = (SELECT owner FROM sessions WHERE number = NEW.session_number);
END;
CREATE TRIGGER checkpoint_removed BEFORE DELETE ON checkpoints BEGIN
    DELETE FROM answers WHERE session_number = OLD.session_number AND turn = OLD.turn;
    UPDATE owners SET num_states = num_states - 1, num_bytes = num_bytes - OLD.num_bytes
    WHERE owner = (SELECT owner FROM sessions WHERE number = OLD.session_number);
END;
CREATE TRIGGER answer_added AFTER INSERT ON answers BEGIN
    UPDATE owners SET num_bytes = num_bytes + NEW.num_bytes
    WHERE owner = (SELECT owner FROM sessions WHERE number = NEW.session_number);
END;
CREATE TRIGGER answer_removed BEFORE DELETE ON answers BEGIN
    UPDATE owners SET num_bytes = num_bytes - OLD.num_bytes
    WHERE owner = (SELECT owner FROM sessions WHERE number = OLD.session_number);
END;
INSERT INTO sessions (number, id, owner, created_at, last_used_at, ttl_s, turn, num_tokens,
    parent_id, parent_turn, metadata) VALUES
    (3, 'a', '', 10.0, 20.0, NULL, 2, 200, NULL, NULL, '{"k": "v"}'),
    (7, 'b', '', 30.0, 30.0, NULL, 0, 0, NULL, NULL, '{}'),
    (8, 'c', 'x', 30.0, 40.0, 60.0, 2, 90, 'a', 1, '{}');
INSERT INTO checkpoints (session_number, turn, num_tokens, created_at, num_bytes, blob) VALUES
    (3, 2, 200, 20.0, 6, x'617374617465'),
    (8, 1, 50, 30.0, 2, x'6331'), (8, 2, 90, 40.0, 2, x'6332');
INSERT INTO answers (session_number, turn, key, request, num_bytes, answer)
    VALUES (8, 2, 'key', 'request', 8, 'answered');
PRAGMA application_id = 0x6C746E64;
PRAGMA user_version = 2;
"""

RESPONSE = ResponseRecord("r", "", 50.0, None, "completed", "{}", 9, has_state=True)

VERSIONS = {1: VERSION_1, 2: VERSION_2}
OF_X = {1: Usage(), 2: Usage(1, 2, 2 + 2 + 8)}
"""What the owner x has in each; the nameless owner has the same in all."""


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    found = request.param
    assert isinstance(found, int)
    return found


@pytest.fixture
def old_store(tmp_path: Path, version: int) -> Path:
    """Folder of a store as an earlier version wrote it."""
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(VERSIONS[version])
    db.close()
    return tmp_path


def schema_of(folder: Path) -> dict[str, str]:
    """The statement that makes each table, index and trigger."""
    db = sqlite3.connect(folder / FILE)
    found = db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    db.close()
    return {name: " ".join(sql.replace('"', "").split()) for name, sql in found}


def test_a_store_of_an_earlier_version_goes_on(old_store: Path, version: int) -> None:
    total = Usage(2 + OF_X[version].num_sessions, 1 + OF_X[version].num_states)

    async def main() -> None:
        for _ in range(2):
            async with opened(old_store) as store:
                a = SessionRecord("a", 10.0, 20.0, "", 2, 200, 1, metadata={"k": "v"})
                assert await listed(store) == [SessionRecord("b", 30.0, 30.0), a]
                assert await blob_of(store, "a") == b"astate"
                assert [c.created_at for c in await store.checkpoints("a")] == [20.0]
                assert await store.usage("") == Usage(2, 1, 6)
                assert await store.usage("x") == OF_X[version]
                assert store.total == replace(total, num_bytes=6 + OF_X[version].num_bytes)
        async with opened(old_store) as store:
            await commit(store, "a", 3, b"next", keep=8)
            await commit(store, "b", 1, b"first", keep=8)
            await store.responses.insert(RESPONSE, b"state of r")
            assert await store.responses.load_blob("r") == b"state of r"
            assert await store.usage("") == Usage(2, 4, 6 + 4 + 5 + 2 + 10, 1)
            await store.delete("a")
            assert b"astate" not in raw(old_store)
        db = sqlite3.connect(old_store / FILE)
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        db.close()

    asyncio.run(main())


def test_what_only_version_2_had_is_still_there(tmp_path: Path) -> None:
    async def main() -> None:
        db = sqlite3.connect(tmp_path / FILE)
        db.executescript(VERSION_2)
        db.close()
        async with opened(tmp_path) as store:
            c = SessionRecord("c", 30.0, 40.0, "x", 2, 90, 2, 60.0, "a", 1)
            assert await store.get("c") == c
            assert [await store.load_blob("c", turn) for turn in (1, 2)] == [b"c1", b"c2"]
            assert await store.find_answer("c", "key") == KeptAnswer("key", "request", "answered")
            assert await store.expired(1000.0, 9) == ["c"]
            await store.rewind("c", 1, 50.0)
            assert await store.usage("x") == Usage(1, 1, 2)
            await store.delete("c")
            assert await store.usage("x") == Usage()

    asyncio.run(main())


def test_a_migrated_store_has_the_tables_of_a_new_one(old_store: Path) -> None:
    async def open_both() -> None:
        async with opened(old_store), opened(old_store / "new"):
            pass

    asyncio.run(open_both())
    assert schema_of(old_store) == schema_of(old_store / "new")


@pytest.mark.parametrize("begun", [0.3, 0.7, 1.0])
def test_a_migration_that_fails_changes_nothing(
    old_store: Path, version: int, begun: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever statement it does."""

    def content() -> list[str]:
        db = sqlite3.connect(old_store / FILE)
        found = list(db.iterdump())
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        db.close()
        return found

    before = content()
    statements = statements_of(schema.MIGRATIONS[version])
    statements[round(begun * len(statements)) :] = ["INSERT INTO nowhere VALUES (1);"]
    monkeypatch.setitem(schema.MIGRATIONS, version, "".join(statements))
    assert "nowhere" in refusal(old_store / FILE)
    assert content() == before
    monkeypatch.undo()
    test_a_store_of_an_earlier_version_goes_on(old_store, version)


def statements_of(script: str) -> list[str]:
    """The script, cut into its statements."""
    found = [""]
    for line in script.splitlines(keepends=True):
        found[-1] += line
        if sqlite3.complete_statement(found[-1]):
            found.append("")
    assert len(found) > 10
    return found[:-1]


def test_every_earlier_version_can_be_migrated() -> None:
    assert sorted(schema.MIGRATIONS) == list(range(SCHEMA_VERSION))
    assert sorted(VERSIONS) == list(range(1, SCHEMA_VERSION))
