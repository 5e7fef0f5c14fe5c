"""A snapshot has the content of one moment, whatever is written meanwhile."""

import asyncio
import itertools
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.sqlite import snapshots, writer
from server.sessions.sqlite.snapshots import SOCKET, SnapshotError, serve_snapshots, snapshot
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.sqlite.writer import Writer
from tests.patience import until, wait_until
from tests.server.sessions.stores import (
    FILE,
    FILES,
    blob_of,
    commit,
    found,
    listed,
    opened,
    session,
    state_files,
    states_in_files,
    writer_held,
)

NUM_LOADED = 6


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"], autouse=True)
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 20):
        yield bool(request.param)


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is written between any two steps."""
    works = Writer._between_steps

    def patient(self: Writer, status: int, remaining: int, total: int) -> None:
        wait_until(lambda: self._closing or not self._jobs.empty())
        works(self, status, remaining, total)

    monkeypatch.setattr(writer, "PAGES_PER_STEP", 1)
    monkeypatch.setattr(Writer, "_between_steps", patient)


def blob(name: str, turn: int) -> bytes:
    """A blob of a few pages, so that a database of several needs many steps."""
    return f"{name} {turn} ".encode() * 4000


async def loaded(store: SQLiteStore) -> None:
    for i in range(NUM_LOADED):
        await store.insert(session(f"loaded-{i}"))
        await commit(store, f"loaded-{i}", 1, blob(f"loaded-{i}", 1), keep=3)


async def check_whole(folder: Path) -> dict[str, int]:
    """Every state of the snapshot is as committed. Returns the turns of the sessions."""
    async with opened(folder) as store:
        turns = {entry.id: entry.turn for entry in await listed(store)}
        for name, turn in turns.items():
            source = (await found(store, name)).metadata.get("of", name)
            kept = [each.turn for each in await store.checkpoints(name)]
            assert kept == list(range(turn, turn - len(kept), -1))
            for each in kept:
                assert await store.load(name, each) == blob(source, each)
        return turns


@pytest.mark.usefixtures("in_small_steps")
def test_concurrent_writes_are_included_completely_or_not_at_all(
    tmp_path: Path, are_large: bool
) -> None:
    """Two sessions advance alternately, never more than a turn apart; others are forked and
    deleted."""
    acknowledged = dict[str, int]()
    copied = tmp_path / "copied"
    copied.mkdir()

    async def advance(store: SQLiteStore) -> None:
        for turn in itertools.count(1):
            for name in ("a", "b"):
                assert await commit(store, name, turn, blob(name, turn), keep=3)
                acknowledged[name] = turn

    async def fork_and_delete(store: SQLiteStore) -> None:
        for number in itertools.count(1):
            turn = (await found(store, "a")).turn
            if turn:
                await store.fork("a", replace(session(f"fork-{number}", of="a"), turn=turn))
                await store.delete("session", f"fork-{number - 2}")
            await asyncio.sleep(0)

    async def main() -> None:
        async with opened(tmp_path) as store:
            await loaded(store)
            for name in ("a", "b"):
                await store.insert(session(name))
            await store.insert(session("deleted"))
            await commit(store, "deleted", 1, blob("deleted", 1))
            working = [asyncio.create_task(each(store)) for each in (advance, fork_and_delete)]
            await until(lambda: acknowledged.get("b", 0) >= 5)
            await store.delete("session", "deleted")
            before = dict(acknowledged)
            await asyncio.to_thread(store.snapshot, copied)
            after = dict(acknowledged)
            assert after["b"] > before["b"]  # the snapshot did not stop the world
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        names = state_files(copied)
        turns = await check_whole(copied)
        assert before["a"] <= turns["a"] <= after["a"] + 1
        assert before["b"] <= turns["b"] <= after["b"] + 1
        assert turns["a"] - turns["b"] in (0, 1)
        assert "deleted" not in turns
        assert {f"loaded-{i}" for i in range(NUM_LOADED)} <= turns.keys()
        assert sum(name.startswith("fork") for name in turns) <= 3
        assert names == state_files(copied)  # opening it swept nothing away
        assert bool(names) == are_large

    asyncio.run(main())


@pytest.mark.parametrize("has_links", [True, False])
def test_it_is_private_and_one_file(
    tmp_path: Path, are_large: bool, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    copied = tmp_path / "copied"
    copied.mkdir()

    async def main() -> None:
        async with opened(tmp_path) as store:
            await loaded(store)
            await asyncio.to_thread(store.snapshot, copied)

    asyncio.run(main())
    assert {path.name for path in copied.iterdir()} == {FILE, FILES}
    files = [path for path in copied.rglob("*") if path.is_file()]
    assert len(files) == 1 + (NUM_LOADED if are_large else 0)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert asyncio.run(check_whole(copied)) == {f"loaded-{i}": 1 for i in range(NUM_LOADED)}


@pytest.mark.usefixtures("in_small_steps")
def test_closing_the_store_does_not_wait_for_it(tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()

    async def main() -> None:
        store = SQLiteStore(tmp_path / FILE)
        await loaded(store)
        async with writer_held(store):
            copying = asyncio.create_task(asyncio.to_thread(store.snapshot, copied))
            await until(lambda: store._writer._jobs.qsize() > 0)
            closing = asyncio.create_task(store.close())
            await until(lambda: store._writer._closing)
        with pytest.raises(StorageFailed, match="closed"):
            await copying
        await closing
        with pytest.raises(StorageFailed, match="closed"):
            await asyncio.to_thread(store.snapshot, tmp_path / "again")

    (tmp_path / "again").mkdir()
    asyncio.run(main())


def test_a_failing_store_gives_no_snapshot_and_continues(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await loaded(store)
            (tmp_path / "full").mkdir()
            (tmp_path / "full" / FILE).mkdir()
            with pytest.raises((OSError, sqlite3.Error)):
                await asyncio.to_thread(store.snapshot, tmp_path / "full")
            assert await blob_of(store, "loaded-0") == blob("loaded-0", 1)

    asyncio.run(main())


def num_snapshots(folder: Path) -> int:
    return len(list(folder.glob(f"{snapshots.PREFIX}*")))


def test_another_process_gets_one_from_the_server_and_the_server_removes_it(
    tmp_path: Path,
) -> None:
    data = tmp_path / ("long" * 30)  # longer than the address of a socket may be
    data.mkdir()
    left_over = data / f"{snapshots.PREFIX}1"
    left_over.mkdir()

    def ask() -> None:
        for _ in range(2):
            with snapshot(data) as folder:
                assert folder.parent == data
                shutil.copytree(folder, tmp_path / "copied", dirs_exist_ok=True)

    async def main() -> None:
        async with opened(data) as store:
            await loaded(store)
            with serve_snapshots(store, data):
                assert not left_over.exists()
                assert stat.S_IMODE((data / SOCKET).stat().st_mode) == 0o600
                await asyncio.to_thread(ask)
                await until(lambda: num_snapshots(data) == 0)
            assert not (data / SOCKET).exists()

    asyncio.run(main())
    assert len(asyncio.run(check_whole(tmp_path / "copied"))) == NUM_LOADED


def test_without_a_server_the_store_is_opened(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await loaded(store)

    asyncio.run(main())
    (tmp_path / SOCKET).touch()  # as a server that was killed leaves one
    with snapshot(tmp_path) as folder:
        shutil.copytree(folder, tmp_path / "copied")
    assert num_snapshots(tmp_path) == 0
    assert len(asyncio.run(check_whole(tmp_path / "copied"))) == NUM_LOADED


def test_where_there_is_none_one_line_says_why(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no session store"), snapshot(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []

    async def main() -> None:
        async with opened(tmp_path):  # but offers none
            with pytest.raises(SnapshotError, match="in use"), snapshot(tmp_path):
                pass

    asyncio.run(main())


def test_the_server_says_why_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SQLiteStore, folder: Path) -> None:
        del self
        raise OSError(f"no space in {folder.parent}")

    monkeypatch.setattr(SQLiteStore, "snapshot", fail)

    def ask() -> None:
        with pytest.raises(SnapshotError, match=f"no space in {tmp_path}"), snapshot(tmp_path):
            pass

    async def main() -> None:
        async with opened(tmp_path) as store:
            with serve_snapshots(store, tmp_path):
                await asyncio.to_thread(ask)
                await until(lambda: num_snapshots(tmp_path) == 0)

    asyncio.run(main())
