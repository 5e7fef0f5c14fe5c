"""Opening: our file is private and has its tables; any other is rejected and left unchanged."""

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server.sessions.sqlite.schema import APPLICATION_ID, SCHEMA_VERSION
from server.sessions.sqlite.store import SQLiteStore
from tests.server.sessions.stores import (
    FILE,
    FILES,
    commit,
    insert,
    opened,
    refusal,
    response,
    session,
    states_in_files,
)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_read_what_is_stored(tmp_path: Path, umask: int) -> None:
    async def main() -> None:
        folder = tmp_path / "new"
        async with opened(folder) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"state")
            assert mode(folder) == 0o700
            assert {path.name: mode(path) for path in folder.iterdir()} == {
                FILE: 0o600,
                f"{FILE}-wal": 0o600,
                f"{FILE}-clock": 0o600,
                FILES: 0o700,
            }
            assert [mode(path) for path in (folder / FILES).iterdir()] == [0o600]
        (folder / FILE).chmod(0o644)
        (folder / FILES).chmod(0o755)
        async with opened(folder) as store:
            await commit(store, "a", 2, b"next")
            assert [mode(folder / name) for name in (FILE, f"{FILE}-wal", FILES)] == [
                *(0o600, 0o600, 0o700)
            ]

    before = os.umask(umask)
    try:
        with states_in_files():
            asyncio.run(main())
    finally:
        os.umask(before)


def write_text(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 500)


def write_database(*statements: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        db = sqlite3.connect(path)
        for statement in statements:
            db.execute(statement)
        db.close()

    return write


def written_by(version: int) -> Callable[[Path], None]:
    return write_database(
        f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {version}"
    )


def another(version: int) -> str:
    return f"store version {version}, this latentd uses {SCHEMA_VERSION}"


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "damaged, or not a latentd session store"),
        (Path.mkdir, "unable to open"),
        (write_database("CREATE TABLE t (x)"), "not a latentd session store"),
        (write_database("PRAGMA application_id = 1"), "not a latentd session store"),
        (written_by(SCHEMA_VERSION + 1), another(SCHEMA_VERSION + 1)),
        (written_by(SCHEMA_VERSION - 1), another(SCHEMA_VERSION - 1)),
        (written_by(1), another(1)),
    ],
)
def test_what_is_not_a_store_of_ours_is_refused_and_left_alone(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    def content() -> bytes:
        return path.read_bytes() if path.is_file() else b""

    path = tmp_path / FILE
    write(path)
    path.chmod(0o755)
    before = (content(), mode(path))
    assert reason in refusal(path)
    assert (content(), mode(path)) == before
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_store_without_its_tables_is_refused(tmp_path: Path) -> None:
    written_by(SCHEMA_VERSION)(tmp_path / FILE)
    assert "no such table" in refusal(tmp_path / FILE)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refusal(tmp_path / folder / FILE)


def test_a_folder_of_states_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILES).write_bytes(b"")
    assert FILES in refusal(tmp_path / FILE)
    (tmp_path / FILES).unlink()
    asyncio.run(close_a_new_store(tmp_path / FILE))  # it did not stay locked


def test_a_folder_that_cannot_be_written_to_is_refused() -> None:
    """Also one with a store of ours in it. Root may write everywhere: become nobody for a
    moment."""
    user, reasons = os.geteuid(), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (folder / "new", folder / "old"):
            path.mkdir()
        asyncio.run(close_a_new_store(folder / "old" / FILE))
        (folder / "old" / FILE).chmod(0o444)
        for path in (folder / "new", folder / "old"):
            path.chmod(0o555)
        folder.chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            reasons = [refusal(folder / name / FILE) for name in ("new", "old")]
        finally:
            os.seteuid(user)
            (folder / "new").chmod(0o755)
            (folder / "old").chmod(0o755)
    assert reasons == ["unable to open database file", "attempt to write a readonly database"]


async def close_a_new_store(path: Path) -> None:
    await SQLiteStore(path).close()


async def fill(folder: Path) -> None:
    async with opened(folder) as store:
        await store.insert(session("a"))
        await store.insert(session("b"))
        await commit(store, "a", 1, b"A")
        await insert(store, response("r"), b"R")
        await store.insert(response("s"))


def test_the_accounts_are_those_of_the_tables(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path))
    db = sqlite3.connect(tmp_path / FILE)
    body_bytes = len('{"é": 1}'.encode())
    assert db.execute("SELECT * FROM owners").fetchall() == [("", 2, 2, 2, 2 + 2 * body_bytes)]
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM owners",
        *(
            f"UPDATE owners SET num_{what} = num_{what} + 1"
            for what in ("sessions", "responses", "states")
        ),
    ],
)
def test_a_store_with_wrong_accounts_is_refused(tmp_path: Path, statement: str) -> None:
    asyncio.run(fill(tmp_path))
    db = sqlite3.connect(tmp_path / FILE)
    db.execute(statement)
    db.commit()
    db.close()
    assert "its accounts say" in refusal(tmp_path / FILE)
