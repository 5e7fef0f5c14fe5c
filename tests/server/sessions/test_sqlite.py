"""The SQLite store: what is asked for together is written together, and what is erased is gone."""

import asyncio
import math
import multiprocessing
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.sqlite.schema import APPLICATION_ID, SCHEMA_VERSION
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.sqlite.writer import MOST_TOGETHER
from server.sessions.store import StoreError, Turn, Usage
from tests.patience import PATIENCE_S
from tests.server.sessions.stores import (
    FILE,
    blob_of,
    commit,
    listed,
    opened,
    raw,
    record,
    refusal,
    writer_held,
)


def test_a_session_from_its_creation_to_its_deletion(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "new" / "folder") as store:
            made = record("a", topic="cats\n\0é")
            await store.create(made)
            assert await store.get("a") == made
            assert await blob_of(store, "a") is None
            await store.commit("a", Turn(1, 12, 3.5, b"first"), keep=1)
            await store.commit("a", Turn(2, 30, 4.5, b"second"), keep=1)
            assert await store.get("a") == replace(
                made, last_used_at=4.5, turn=2, num_tokens=30, num_checkpoints=1
            )
            assert await blob_of(store, "a") == b"second"
            assert await store.delete("a")
            assert not await store.delete("a")
            assert await store.get("a") is None
            assert await blob_of(store, "a") is None

    asyncio.run(main())


def test_reopening_finds_everything(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.create(record(name, topic=name))
            await commit(store, "a", 1, b"A" * 100_000)
            await commit(store, "b", 1, b"")
            before = await listed(store)
            totals = store.total
        async with opened(tmp_path) as store:
            assert await listed(store) == before
            assert [len(before), store.total] == [3, totals]
            assert await blob_of(store, "a") == b"A" * 100_000
            assert await blob_of(store, "b") == b""
            assert await blob_of(store, "c") is None

    asyncio.run(main())


def test_pages_are_newest_first_whatever_was_used_or_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abcdefg":
                await store.create(record(name))
            await commit(store, "b", 1, b"")
            await store.delete("g")
            await store.delete("c")
            await store.create(record("h"))
            seen, after = "", None
            while page := await store.list("", 2, after, 0.0):
                assert len(page) <= 2
                seen += "".join(found.id for found in page)
                after = page[-1].id
            assert seen == "hfedba"
            assert await store.list("", 10, "nobody", 0.0) == []

    asyncio.run(main())


def test_totals_are_exact(tmp_path: Path) -> None:
    async def main() -> None:
        chance, blobs, turns = random.Random(0), dict[str, bytes](), dict[str, int]()
        async with opened(tmp_path) as store:
            for step in range(200):
                name = str(chance.randrange(12))
                if name not in turns:
                    await store.create(record(name))
                    turns[name] = 0
                elif chance.random() < 0.2:
                    await store.delete(name)
                    del turns[name]
                    blobs.pop(name, None)
                else:
                    turns[name] += 1
                    blobs[name] = bytes(chance.randrange(20_000))
                    await commit(store, name, turns[name], blobs[name])
                if step % 7 == 0:
                    with pytest.raises(StorageFailed):
                        await commit(store, name, 1000, bytes(5))
                sizes = [len(blob) for blob in blobs.values()]
                assert store.total == Usage(len(turns), len(sizes), sum(sizes))
            totals = store.total
        async with opened(tmp_path) as store:
            assert store.total == totals

    asyncio.run(main())


@pytest.mark.parametrize("turn", [-1, 0, 1, 3])
def test_only_the_next_turn_can_be_committed(tmp_path: Path, turn: int) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.create(record("a"))
            await commit(store, "a", 1, b"one")
            before = (await store.get("a"), await blob_of(store, "a"), store.total)
            with pytest.raises(StorageFailed, match="session a is not at turn"):
                await commit(store, "a", turn, b"wrong")
            assert (await store.get("a"), await blob_of(store, "a"), store.total) == before
            await commit(store, "a", 2, b"two")
            assert await blob_of(store, "a") == b"two"

    asyncio.run(main())


def test_a_turn_of_a_session_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            with pytest.raises(StorageFailed, match="session ghost"):
                await commit(store, "ghost", 1, b"boo")
            assert store.total == Usage()
            assert await listed(store) == []

    asyncio.run(main())


def test_what_waits_shares_transactions_and_is_answered_after_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            names = [str(number) for number in range(2 * MOST_TOGETHER + 10)]
            for name in names:
                await store.create(record(name))
            begun, too_early = list[str](), list[asyncio.Task[None]]()

            def trace(sql: str) -> None:
                if sql == "BEGIN IMMEDIATE":
                    begun.append(sql)
                if sql == "COMMIT" and len(begun) == 1:
                    time.sleep(0.05)  # time for the loop to see an answer that came too early
                    too_early.extend(commit for commit in commits if commit.done())

            async with writer_held(store):
                commits = [
                    asyncio.create_task(commit(store, name, 1, name.encode())) for name in names
                ]
                await asyncio.sleep(0)
                store._writer.db.set_trace_callback(trace)
            await asyncio.gather(*commits)
            store._writer.db.set_trace_callback(None)
            assert len(begun) == math.ceil(len(names) / MOST_TOGETHER)
            assert not too_early
            for name in names:
                assert await blob_of(store, name) == name.encode()

    asyncio.run(main())


def test_who_fails_in_a_shared_transaction_fails_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.create(record(name))
            async with writer_held(store):
                asked = asyncio.gather(
                    commit(store, "a", 1, b"A"),
                    commit(store, "b", 7, b"wrong turn"),
                    store.create(record("a", second="yes")),
                    store._run(lambda db: db.execute("INSERT INTO nowhere VALUES (1)")),
                    store._run(lambda _: 1 // 0),
                    store.delete("c"),
                    commit(store, "a", 2, b"AA"),
                    return_exceptions=True,
                )
                await asyncio.sleep(0)
            answers = await asked
            assert [type(answer) for answer in answers[1:5]] == [StorageFailed] * 4
            assert [answers[0], *answers[5:]] == [None, True, None]
            assert await blob_of(store, "a") == b"AA"
            assert [found.id for found in await listed(store)] == ["b", "a"]
            assert await store.get("b") == record("b")
            assert store.total == Usage(2, 1, 2)

    asyncio.run(main())


def test_a_caller_who_left_changes_nothing_for_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        faults = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        async with opened(tmp_path) as store:
            async with writer_held(store):
                leaving = asyncio.create_task(store.create(record("a")))
                staying = asyncio.create_task(store.create(record("b")))
                await asyncio.sleep(0)
                leaving.cancel()
            await staying
            assert [found.id for found in await listed(store)] == ["b", "a"]
        assert not faults

    asyncio.run(main())


def test_a_commit_is_flushed_to_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            settings = [
                store._writer.db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
            ]
            assert settings == ["wal", 2, 1, 1]

    asyncio.run(main())


def test_closing_finishes_what_was_asked_for_and_refuses_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        store = SQLiteStore(tmp_path / FILE)
        async with writer_held(store):
            asked = [asyncio.create_task(store.create(record(name))) for name in "abc"]
            await asyncio.sleep(0)
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(0)
            with pytest.raises(StorageFailed, match="closed"):
                await asyncio.wait_for(store.create(record("d")), PATIENCE_S)
        await asyncio.gather(*asked, closing)
        with pytest.raises(StorageFailed, match="closed"):
            await asyncio.wait_for(store.get("a"), PATIENCE_S)
        await store.close()
        async with opened(tmp_path) as again:
            assert [found.id for found in await listed(again)] == ["c", "b", "a"]

    asyncio.run(main())


def write_text(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 500)


def write_database(*statements: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        db = sqlite3.connect(path)
        for statement in statements:
            db.execute(statement)
        db.close()

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "damaged, or not a latentd session store"),
        (Path.mkdir, "unable to open"),
        (write_database("CREATE TABLE t (x)"), "not a latentd session store"),
        (write_database("PRAGMA application_id = 1"), "not a latentd session store"),
        *(
            (
                write_database(
                    f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {version}"
                ),
                f"store version {version}, this latentd uses {SCHEMA_VERSION}",
            )
            for version in (-1, 0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1)
        ),
    ],
)
def test_what_is_not_a_store_of_ours_is_refused_and_left_alone(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / FILE
    write(path)
    before = path.read_bytes() if path.is_file() else b""
    assert reason in refusal(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_store_without_its_tables_is_refused(tmp_path: Path) -> None:
    write_database(
        f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {SCHEMA_VERSION}"
    )(tmp_path / FILE)
    assert "no such table" in refusal(tmp_path / FILE)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refusal(tmp_path / folder / FILE)


def test_a_folder_that_cannot_be_written_to_is_refused() -> None:
    """Also one with a store of ours in it. Root may write everywhere: be nobody for a moment."""
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


def try_to_open(path: str, told: Connection) -> None:
    """In another process: say why the store cannot be opened."""
    try:
        SQLiteStore(Path(path))
        told.send("opened")
    except StoreError as error:
        told.send(str(error))


def test_a_store_belongs_to_one_server(tmp_path: Path) -> None:
    async def main() -> None:
        processes = multiprocessing.get_context("spawn")
        for _ in range(2):  # a new file, and one that was closed before
            async with opened(tmp_path) as store:
                assert refusal(tmp_path / FILE) == "in use by another latentd server"
                ours, theirs = processes.Pipe()
                process = processes.Process(target=try_to_open, args=(str(tmp_path / FILE), theirs))
                process.start()
                assert "in use by another latentd server" in ours.recv()
                process.join()
                await listed(store)

    asyncio.run(main())


def test_deleted_bytes_are_on_the_disk_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.create(record("a", secret="<told in confidence>"))
            await store.create(record("b", secret="<still needed>"))
            await commit(store, "a", 1, b"<first state>" * 1000)
            await commit(store, "a", 2, b"<second state>" * 1000)
            secrets = [b"<told in confidence>", b"<first state>", b"<second state>"]
            assert all(secret in raw(tmp_path) for secret in secrets)
            await store.delete("a")
            left = raw(tmp_path)
            assert not any(secret in left for secret in secrets)
            assert b"<still needed>" in left
        assert not any(secret in raw(tmp_path) for secret in secrets)

    asyncio.run(main())


def test_no_copy_of_deleted_bytes_stays_behind_among_many_sessions(tmp_path: Path) -> None:
    """SQLite moves rows between its pages: what it leaves where they were must be erased too.

    With this seed it does, unless the rows are padded.
    """

    async def main() -> None:
        chance = random.Random(19)
        turns, marks, gone = dict[str, int](), dict[str, list[bytes]](), list[bytes]()
        async with opened(tmp_path) as store:
            for step in range(140):
                move, mark = chance.random(), f"<{chance.getrandbits(64):016x}>"
                if move < 0.4 or not turns:
                    name = str(step)
                    times = chance.choice([1, 2, 10, 60])
                    await store.create(record(name, text=mark * times))
                    turns[name], marks[name] = 0, [mark.encode()]
                    continue
                name = chance.choice(list(turns))
                if move < 0.8:
                    turns[name] += 1
                    marks[name].append(mark.encode())
                    times = chance.choice([1, 5, 20, 100, 300, 1000])
                    await commit(store, name, turns[name], mark.encode() * times)
                else:
                    await store.delete(name)
                    del turns[name]
                    gone += marks.pop(name)
                    left = raw(tmp_path)
                    assert not [mark for mark in gone if mark in left]
        assert all(found[0] in raw(tmp_path) for found in marks.values())

    asyncio.run(main())
