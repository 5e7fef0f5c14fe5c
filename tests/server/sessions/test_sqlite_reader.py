"""What reads the store waits for no commit, and no commit for what reads."""

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.sqlite import writer as sqlite_writer
from server.sessions.sqlite.reader import NUM_READERS
from server.sessions.sqlite.store import SQLiteStore
from server.threads import OWNER
from tests.patience import PATIENCE_S, until
from tests.server.sessions.stores import (
    FILE,
    blob_of,
    commit,
    found,
    listed,
    opened,
    session,
    writer_held,
)


class Slow:
    """Something that reads until it is let go."""

    def __init__(self, store: SQLiteStore, owner: str = "") -> None:
        self.is_reading, self.go = threading.Event(), threading.Event()
        self._store = store
        self._owner = owner

    def start(self) -> "asyncio.Task[int]":
        return asyncio.create_task(self._run())

    async def _run(self) -> int:
        OWNER.set(self._owner)
        return await self._store._read(self._count)

    def _count(self, db: sqlite3.Connection) -> int:
        db.execute("SELECT count(*) FROM entries").fetchone()
        self.is_reading.set()
        self.go.wait()
        [count] = db.execute("SELECT count(*) FROM entries").fetchone()
        return int(count)


def test_commits_and_reads_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            slow = [Slow(store) for _ in range(NUM_READERS)]
            tasks = [each.start() for each in slow]
            for each in slow:
                await asyncio.to_thread(each.is_reading.wait)
            await asyncio.wait_for(store.insert(session("b")), PATIENCE_S)
            assert await asyncio.wait_for(commit(store, "b", 1, b"x" * 5000), PATIENCE_S)
            for each in slow:
                each.go.set()
            assert await asyncio.gather(*tasks) == [1] * NUM_READERS  # as it was when they began
            async with writer_held(store):
                assert len(await asyncio.wait_for(listed(store), PATIENCE_S)) == 2
                assert await asyncio.wait_for(blob_of(store, "b"), PATIENCE_S) == b"x" * 5000
                assert (await found(store, "b")).turn == 1

    asyncio.run(main())


def test_owners_read_in_turn(tmp_path: Path) -> None:
    """However many of one's calls wait, another one's is the next but one."""

    async def main() -> None:
        async with opened(tmp_path) as store:
            many = [Slow(store, "many") for _ in range(20)]
            tasks = [each.start() for each in many]
            await until(lambda: sum(each.is_reading.is_set() for each in many) == NUM_READERS)
            other = Slow(store, "other")
            last = other.start()
            await asyncio.sleep(0)
            for each in many[: NUM_READERS + 1]:
                each.go.set()
            await until(other.is_reading.is_set)
            other.go.set()
            assert await last == 0
            assert sum(each.is_reading.is_set() for each in many) < 20
            for each in many:
                each.go.set()
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_delete_waits_for_what_still_reads_what_was_there(tmp_path: Path) -> None:
    secret = b"what nobody may read"

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            assert await commit(store, "a", 1, secret * 100)
            slow = Slow(store)
            reading = slow.start()
            await asyncio.to_thread(slow.is_reading.wait)
            deleting = asyncio.create_task(store.delete("session", "a"))
            await until(lambda: not store._writer._jobs.qsize())
            slow.go.set()
            assert await reading == 1
            assert await deleting
            for path in (tmp_path / FILE, tmp_path / f"{FILE}-wal"):
                assert secret not in path.read_bytes()

    asyncio.run(main())


def test_the_log_does_not_grow_without_bounds_beside_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "MAX_LOG_BYTES", 3 << 20)

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            for turn in range(1, 30):
                slow = Slow(store)
                reading = slow.start()
                await asyncio.to_thread(slow.is_reading.wait)
                asyncio.get_running_loop().call_later(0.01, slow.go.set)
                assert await commit(store, "a", turn, bytes([turn]) * 500_000)
                await reading
                assert (tmp_path / f"{FILE}-wal").stat().st_size < 6 << 20

    asyncio.run(main())


def test_a_closed_store_reads_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            slow = Slow(store)
            reading = slow.start()
            await asyncio.to_thread(slow.is_reading.wait)
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(0)
            with pytest.raises(StorageFailed, match="closed"):
                await listed(store)
            slow.go.set()
            assert await reading == 0
            await closing

    asyncio.run(main())
