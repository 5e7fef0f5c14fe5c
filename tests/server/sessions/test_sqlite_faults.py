"""The SQLite store on a full or damaged disk, or after a crash: a fault affects only the request
concerned, and acknowledged data remains."""

import asyncio
import multiprocessing
import random
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from server.errors import StorageFailed, StorageFull
from server.sessions.sqlite.schema import PAGE_BYTES
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, EntryKind, StoreError, StoreUsage
from tests.patience import PATIENCE_S
from tests.server.sessions.stores import (
    FILE,
    KINDS,
    advanced,
    blob_of,
    commit,
    forbidden,
    found,
    full_disk,
    insert,
    listed,
    new,
    opened,
    raw,
    refusal,
    response,
    session,
    state_files,
    states_in_files,
    until_queued,
    writer_held,
    written,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_fails_one_turn_and_nothing_else(tmp_path: Path, kind: EntryKind) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "ab":
                await store.insert(new(kind, name))
                if kind == "session":
                    await commit(store, name, 1, b"one")
            turn = 2 if kind == "session" else 1
            large = bytes(50 * PAGE_BYTES)
            before = ([await found(store, name, kind) for name in "ab"], store.total)
            blob = await blob_of(store, "a", kind)
            with full_disk(store, 4):
                for _ in range(3):
                    with pytest.raises(StorageFull, match="full") as caught:
                        await commit(store, "a", turn, large, kind=kind)
                    assert (caught.value.status, caught.value.code) == (507, "storage_full")
                    with pytest.raises(StorageFull):
                        await insert(store, advanced(new(kind, "c"), 1), large)
                    assert await store.get(kind, "c") is None
                    now = ([await found(store, name, kind) for name in "ab"], store.total)
                    assert now == before
                    assert await blob_of(store, "a", kind) == blob
                async with writer_held(store):
                    asked = asyncio.gather(
                        commit(store, "a", turn, large, kind=kind),
                        commit(store, "b", turn, b"small", kind=kind),
                        return_exceptions=True,
                    )
                    await until_queued(store, 2)
                failed, done = await asked
                assert isinstance(failed, StorageFull)
                assert done is True
                assert [await blob_of(store, name, kind) for name in "ab"] == [blob, b"small"]
                assert await store.delete(kind, "b")
            assert await commit(store, "a", turn, large, kind=kind)
            assert store.total.num_states == 1

    asyncio.run(main())


def test_a_transaction_that_cannot_commit_fails_for_everyone(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "ab":
                await store.insert(session(name))
            before = (await listed(store), store.total)
            with forbidden(store, sqlite3.SQLITE_TRANSACTION, "COMMIT"):
                answers = await asyncio.wait_for(
                    asyncio.gather(
                        *(commit(store, name, 1, b"one") for name in "ab"), return_exceptions=True
                    ),
                    PATIENCE_S,
                )
            assert [type(answer) for answer in answers] == [StorageFailed] * 2
            assert (await listed(store), store.total) == before
            await commit(store, "a", 1, b"again")
            assert store.total == StoreUsage(2, 0, 1, 5)

    asyncio.run(main())


def test_a_transaction_that_cannot_even_roll_back_does_not_stop_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))

            def forbid_the_end(db: sqlite3.Connection) -> None:
                def decide(asked: int, argument: str | None, *_: str | None) -> int:
                    ends = asked == sqlite3.SQLITE_TRANSACTION and argument != "BEGIN"
                    return sqlite3.SQLITE_DENY if ends else sqlite3.SQLITE_OK

                db.set_authorizer(decide)

            with pytest.raises(StorageFailed):
                await asyncio.wait_for(store._run(forbid_the_end), PATIENCE_S)
            with pytest.raises(StorageFailed):
                await asyncio.wait_for(written(store), PATIENCE_S)
            store._writer.db.set_authorizer(None)
            with suppress(StorageFailed):
                await asyncio.wait_for(written(store), PATIENCE_S)
            await asyncio.wait_for(written(store), PATIENCE_S)
            assert await store.get("session", "a") == session("a")

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_when_erasing_fails_the_deletion_says_so_and_is_completed_later(
    tmp_path: Path, kind: EntryKind
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "ab":
                await store.insert(replace(new(kind, name), body=f"<secret of {name}>"))
            await store.insert(session("c"))
            with forbidden(store, sqlite3.SQLITE_PRAGMA, "wal_checkpoint"):
                async with writer_held(store):
                    asked = asyncio.gather(
                        store.delete(kind, "a"),
                        commit(store, "c", 1, b"one"),
                        return_exceptions=True,
                    )
                    await until_queued(store, 2)
                deleted, done = await asked
                assert isinstance(deleted, StorageFailed)
                assert done is True
                assert await store.get(kind, "a") is None
                assert b"<secret of a>" in raw(tmp_path)
            await written(store)
            assert await blob_of(store, "c") == b"one"
            assert b"<secret of a>" not in raw(tmp_path)
            assert b"<secret of b>" in raw(tmp_path)

    asyncio.run(main())


async def fill(folder: Path) -> dict[str, tuple[Entry, bytes]]:
    """A closed store with several kinds of pages, and its content."""
    chance, made = random.Random(1), dict[str, tuple[Entry, bytes]]()
    async with opened(folder) as store:
        for number in range(12):
            name = f"session-{number}"
            await store.insert(session(name, text="t" * chance.randrange(400)))
            blob = chance.randbytes(chance.choice([300, 3000, 9000]))
            await commit(store, name, 1, blob)
            made[name] = (await found(store, name), blob)
        for number in range(4):  # their pages are damaged, too
            await insert(store, replace(response(f"response-{number}"), turn=1), bytes(3000))
    return made


async def use(folder: Path, made: dict[str, tuple[Entry, bytes]]) -> bool:
    """Use a damaged store in every way; only documented errors may occur.

    No wrong data may be returned either, except for damage inside a blob, which the codec finds.
    True if the store opened.
    """
    try:
        store = SQLiteStore(folder / FILE)
    except StoreError:
        refusal(folder / FILE)
        return False
    for name, (expected, blob) in made.items():
        with suppress(StorageFailed):
            assert await asyncio.wait_for(store.get("session", name), PATIENCE_S) == expected
        with suppress(StorageFailed):
            loaded = await asyncio.wait_for(blob_of(store, name), PATIENCE_S)
            assert loaded is not None
            assert loaded not in [other for _, other in made.values() if other != blob]
    for call in (
        listed(store),
        commit(store, "session-3", 2, bytes(5000)),
        store.insert(session("new")),
        store.delete("session", "session-5"),
    ):
        with suppress(StorageFailed):
            await asyncio.wait_for(call, PATIENCE_S)
    await asyncio.wait_for(store.close(), PATIENCE_S)
    return True


def put_alone(data: bytes, folder: Path) -> None:
    """Make the store's file the only file in the folder."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    (folder / FILE).write_bytes(data)


@pytest.mark.long
def test_a_page_of_garbage_is_found_or_harmless(tmp_path: Path) -> None:
    made = asyncio.run(fill(tmp_path / "whole"))
    data = (tmp_path / "whole" / FILE).read_bytes()
    chance, opens = random.Random(2), list[bool]()
    for start in range(0, len(data), PAGE_BYTES):
        for garbage in (chance.randbytes(PAGE_BYTES), bytes(PAGE_BYTES)):
            put_alone(data[:start] + garbage + data[start + PAGE_BYTES :], tmp_path / "damaged")
            opens.append(asyncio.run(use(tmp_path / "damaged", made)))
    assert opens[:2] == [False, False]
    assert opens.count(True) > 50


@pytest.mark.long
def test_a_page_in_the_place_of_another_is_the_disks_fault(tmp_path: Path) -> None:
    """A misplaced write can look valid to SQLite; the data returned must still be of the right
    type."""
    made = asyncio.run(fill(tmp_path / "whole"))
    data = (tmp_path / "whole" / FILE).read_bytes()
    chance = random.Random(3)
    for start in range(0, len(data), PAGE_BYTES):
        for _ in range(2):
            other = chance.randrange(len(data) // PAGE_BYTES) * PAGE_BYTES
            page = data[other : other + PAGE_BYTES]
            put_alone(data[:start] + page + data[start + PAGE_BYTES :], tmp_path / "damaged")
            asyncio.run(read_everything(tmp_path / "damaged", list(made)))


async def read_everything(folder: Path, names: list[str]) -> None:
    with suppress(StoreError):
        async with opened(folder) as store:
            for name in names:
                for call in (
                    store.get("session", name),
                    blob_of(store, name),
                    store.list("session", "", 3, name, 0.0),
                ):
                    with suppress(StorageFailed):
                        await asyncio.wait_for(call, PATIENCE_S)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path))
    data = (tmp_path / FILE).read_bytes()
    for size in (*range(PAGE_BYTES, len(data), PAGE_BYTES), 2, 99, 100, 101, PAGE_BYTES + 1):
        put_alone(data[:size], tmp_path)
        assert "damaged" in refusal(tmp_path / FILE)


NAMES = ("a", "b", "c", "d")
LARGE_FROM = 20_000


def content(name: str, turn: int) -> bytes:
    """The blob of a session's turn, each of another size; the larger half are files."""
    chance = random.Random(f"{name} {turn}")
    return chance.randbytes(chance.randrange(1, 40_000))


def commit_until_killed(path: str, results: Connection) -> None:
    """In another process: commit turns of all sessions together, and report which are durable."""

    async def go_on(store: SQLiteStore, name: str) -> None:
        last = await store.get("session", name)
        if last is None:
            await store.insert(session(name))
        turn = 0 if last is None else last.turn
        while True:
            turn += 1
            await commit(store, name, turn, content(name, turn))
            results.send((name, turn))

    async def main() -> None:
        store = SQLiteStore(Path(path))
        await asyncio.gather(*(go_on(store, name) for name in NAMES))

    with states_in_files(LARGE_FROM):
        asyncio.run(main())


def kill_while_committing(path: Path, chance: random.Random) -> dict[str, int]:
    """The last acknowledged turn of each session of a process that was killed."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=commit_until_killed, args=(str(path), theirs))
    process.start()
    theirs.close()
    acknowledged: dict[str, int] = {}
    kill_after = chance.randrange(1, 60)
    with suppress(EOFError, OSError):  # the pipe ends where the process did
        for number in range(10**9):
            name, turn = ours.recv()
            acknowledged[name] = turn
            if number == kill_after:
                time.sleep(chance.uniform(0, 0.01))
                process.kill()
    process.join()
    assert process.exitcode == -9
    assert acknowledged
    return acknowledged


@pytest.mark.long
def test_no_acknowledged_turn_is_lost_by_kill_9(tmp_path: Path) -> None:
    async def check(acknowledged: dict[str, int]) -> None:
        async with opened(tmp_path) as store:
            sizes, num_sessions, files = list[int](), 0, set[str | None]()
            for name in NAMES:
                last = await store.get("session", name)
                num_sessions += last is not None
                if last is None or last.turn == 0:
                    assert name not in acknowledged
                    continue
                assert last.turn - acknowledged.get(name, last.turn) in (0, 1)
                assert last.num_tokens == 10 * last.turn
                blob = content(name, last.turn)
                assert await blob_of(store, name) == blob
                sizes.append(len(blob))
                if len(blob) >= LARGE_FROM:
                    files.add(last.state_id)
            assert store.total == StoreUsage(num_sessions, 0, len(sizes), sum(sizes))
            assert state_files(tmp_path) == files

    chance = random.Random(0)
    for _ in range(8):
        acknowledged = kill_while_committing(tmp_path / FILE, chance)
        asyncio.run(check(acknowledged))
