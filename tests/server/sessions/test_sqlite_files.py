"""Large states in files: written before the database refers to them, and deleted after."""

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import StorageFailed, StorageFull
from server.sessions.sqlite.files import StateFiles
from server.sessions.sqlite.store import LARGE_BYTES, SQLiteStore
from server.sessions.store import StoreUsage
from tests.patience import PATIENCE_S, until
from tests.server.sessions.stores import (
    FILE,
    FILES,
    advanced,
    blob_of,
    commit,
    forbidden,
    found,
    full_disk,
    insert,
    new_state,
    opened,
    pending,
    raw,
    session,
    state_files,
    states_in_files,
    until_queued,
    writer_held,
    written,
)


@pytest.fixture
def small_are_large() -> Iterator[None]:
    with states_in_files():
        yield


def test_the_bytes_of_all_files_are_known(tmp_path: Path, small_are_large: None) -> None:
    del small_are_large

    def measured() -> dict[str, int]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {path.name: path.stat().st_size for path in files}

    async def check(store: SQLiteStore) -> None:
        sizes = measured()
        assert (await store.health()).num_bytes == sum(sizes.values())
        assert store._files.num_bytes == sum(sizes[name] for name in state_files(tmp_path))

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            for turn in range(1, 5):
                await commit(store, "a", turn, bytes(1000 * turn), keep=2)
                await check(store)
            assert store._files.num_bytes == 7000
            assert not await commit(store, "nobody", 1, bytes(100))
            await check(store)
        async with opened(tmp_path) as store:
            await check(store)
            await store.delete("session", "a")
            await check(store)
            assert store._files.num_bytes == 0

    asyncio.run(main())


def test_states_from_a_mebibyte_on_are_files(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            small, large = os.urandom(LARGE_BYTES - 1), os.urandom(LARGE_BYTES)
            await commit(store, "a", 1, small, keep=8)
            assert state_files(tmp_path) == set()
            await commit(store, "a", 2, large, keep=8)
            [name] = state_files(tmp_path)
            assert name == (await found(store, "a")).state_id
            path = tmp_path / FILES / name
            assert path.read_bytes() == large
            assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (
                *(0o600, 0o700),
            )
            assert large[:64] not in (tmp_path / FILE).read_bytes()
            assert large[:64] not in (tmp_path / f"{FILE}-wal").read_bytes()
            assert [await store.load("a", turn) for turn in (1, 2)] == [small, large]
            assert [c.num_bytes for c in await store.checkpoints("a")] == [
                *(LARGE_BYTES, LARGE_BYTES - 1)
            ]
            assert store.total == StoreUsage(1, 0, 2, 2 * LARGE_BYTES - 1)

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_the_file_of_a_replaced_state_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            for turn in range(1, 6):
                await commit(store, "a", turn, b"%d" % turn, keep=2)
                kept = {new_state("a", t, b"%d" % t).id for t in (turn, turn - 1) if t}
                assert state_files(tmp_path) == kept
            await store.rewind("a", 4, 1.0)
            assert state_files(tmp_path) == {new_state("a", 4, b"4").id}
            await store.rewind("a", 0, 1.0)
            assert state_files(tmp_path) == set()

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
@pytest.mark.parametrize("first", ["source", "fork"])
def test_a_file_stays_until_its_last_owner_is_erased(tmp_path: Path, first: str) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("source"))
            await commit(store, "source", 1, b"shared")
            shared = {new_state("source", 1, b"shared").id}
            await store.fork("source", replace(session("fork"), turn=1))
            assert state_files(tmp_path) == shared
            last = "fork" if first == "source" else "source"
            await store.delete("session", first)
            assert state_files(tmp_path) == shared
            assert await blob_of(store, last) == b"shared"
        async with opened(tmp_path) as store:
            assert await blob_of(store, last) == b"shared"
            assert await commit(store, last, 2, b"next")
            assert state_files(tmp_path) == {new_state(last, 2, b"next").id}
            await store.delete("session", last)
            assert state_files(tmp_path) == set()

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_file_that_is_shared_in_the_same_transaction_stays(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"shared")
            async with writer_held(store):
                both = asyncio.gather(
                    store.fork("a", replace(session("b"), turn=1)), store.delete("session", "a")
                )
                await until_queued(store, 2)
            await both
            assert await blob_of(store, "b") == b"shared"

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_the_file_goes_after_the_transaction_not_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            before = state_files(tmp_path)
            with forbidden(store, sqlite3.SQLITE_TRANSACTION, "COMMIT"):
                for call in (store.delete("session", "a"), store.rewind("a", 0, 1.0)):
                    with pytest.raises(StorageFailed):
                        await call
                with pytest.raises(StorageFailed):
                    await commit(store, "a", 2, b"two")
            assert state_files(tmp_path) == before
            assert await blob_of(store, "a") == b"one"

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_transaction_that_fails_leaves_no_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await store.insert(pending("r"))
            await commit(store, "a", 1, b"one")
            before = state_files(tmp_path)
            denials = (
                (sqlite3.SQLITE_TRANSACTION, "COMMIT"),  # of all that is in it
                (sqlite3.SQLITE_INSERT, "checkpoints"),  # of this alone
            )
            for action, what in denials:
                with forbidden(store, action, what):
                    for call in (
                        commit(store, "a", 2, b"two"),
                        commit(store, "r", 1, b"state", kind="response"),
                        insert(store, advanced(session("b"), 1), b"B"),
                    ):
                        with pytest.raises(StorageFailed):
                            await call
                assert state_files(tmp_path) == before
            assert not await commit(store, "a", 9, b"nine")
            with full_disk(store), pytest.raises(StorageFull):
                await insert(store, advanced(session("b", text="t" * 100_000), 1), b"B")
            assert state_files(tmp_path) == before
            assert await commit(store, "a", 2, b"two")  # under the same name as before
            assert await blob_of(store, "a") == b"two"

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
@pytest.mark.parametrize("takes_place", [False, True])
def test_a_cancelled_caller_leaves_no_file(tmp_path: Path, takes_place: bool) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            turn = 2 if takes_place else 9
            async with writer_held(store):
                leaving = asyncio.create_task(commit(store, "a", turn, b"next"))
                await until_queued(store)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            await written(store)
            assert await blob_of(store, "a") == (b"next" if takes_place else b"one")
            assert state_files(tmp_path) == {(await found(store, "a")).state_id}

    asyncio.run(main())


class Died(BaseException):
    """Simulates a crash here."""


@pytest.mark.usefixtures("small_are_large")
@pytest.mark.parametrize("when", ["in the file", "before the transaction"])
def test_what_a_crash_leaves_over_is_swept_at_the_start(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            if when == "in the file":
                (tmp_path / FILES / "unfinished.tmp").write_bytes(b"tw")
            else:
                with monkeypatch.context() as patch:

                    async def die(*_: object, **__: object) -> bool:
                        raise Died

                    patch.setattr(store, "_run", die)
                    with pytest.raises(Died):
                        await commit(store, "a", 2, b"two")
            assert len(state_files(tmp_path)) == 2
        async with opened(tmp_path) as store:
            assert state_files(tmp_path) == {new_state("a", 1, b"one").id}
            assert await blob_of(store, "a") == b"one"
            assert await commit(store, "a", 2, b"two")

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_damaged_index_costs_no_file(tmp_path: Path) -> None:
    async def fill() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await insert(store, advanced(session(name), 1), name.encode())

    async def check() -> None:
        async with opened(tmp_path) as store:
            assert [await blob_of(store, name) for name in "abc"] == [b"a", b"b", b"c"]

    asyncio.run(fill())
    db = sqlite3.connect(tmp_path / FILE)
    [root, page_bytes] = db.execute(
        "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size "
        "WHERE name = 'checkpoints_in_files'"
    ).fetchone()
    db.close()
    data = bytearray((tmp_path / FILE).read_bytes())
    data[(root - 1) * page_bytes + 3 : (root - 1) * page_bytes + 5] = bytes(2)  # it has no cells
    (tmp_path / FILE).write_bytes(data)
    asyncio.run(check())


@pytest.mark.usefixtures("small_are_large")
def test_a_file_left_by_a_crash_is_swept_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            monkeypatch.setattr(store._writer, "_delete_files", lambda: None)
            await store.delete("session", "a")
            assert len(state_files(tmp_path)) == 1
        async with opened(tmp_path):
            assert state_files(tmp_path) == set()

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_file_that_cannot_be_deleted_fails_the_deletion_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(state_id: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", state_id)

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await store.insert(session("b"))
            await commit(store, "a", 1, b"<secret of a>")
            with monkeypatch.context() as patch:
                patch.setattr(store._files, "delete", refuse)
                with pytest.raises(StorageFailed, match="Permission denied"):
                    await store.delete("session", "a")
                assert await commit(store, "b", 1, b"B")  # others go on
                assert b"<secret of a>" in raw(tmp_path)
            assert await store.get("session", "a") is None
            await written(store)
            assert b"<secret of a>" not in raw(tmp_path)
            assert await store.delete("session", "b")

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_missing_file_is_no_blob(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one", keep=2)
            await commit(store, "a", 2, b"two", keep=2)
            (tmp_path / FILES / new_state("a", 2, b"two").id).unlink()
            assert await blob_of(store, "a") is None
            assert await store.load("a", 1) == b"one"
            assert await store.rewind("a", 1, 1.0) is not None
            assert await store.delete("session", "a")

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_a_file_that_cannot_be_read_is_the_disks_fault(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            path = tmp_path / FILES / new_state("a", 1, b"one").id
            path.unlink()
            path.mkdir()
            with pytest.raises(StorageFailed) as caught:
                await blob_of(store, "a")
            assert (caught.value.status, caught.value.code) == (503, "storage_failed")
            path.rmdir()

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_a_disk_that_fails_leaves_the_store_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            before = (await found(store, "a"), store.total, state_files(tmp_path))
            expected = StorageFailed if code == errno.EIO else StorageFull
            with monkeypatch.context() as patch:
                patch.setattr(Path if call == "rename" else os, call, fail)
                for make in (
                    commit(store, "a", 2, b"two"),
                    insert(store, advanced(session("b"), 1), b"B"),
                ):
                    with pytest.raises(StorageFailed) as caught:
                        await make
                    assert type(caught.value) is expected
                    assert caught.value.status == (507 if expected is StorageFull else 503)
            assert (await found(store, "a"), store.total, state_files(tmp_path)) == before
            assert await blob_of(store, "a") == b"one"
            assert await commit(store, "a", 2, b"two")

    asyncio.run(main())


@pytest.mark.usefixtures("small_are_large")
def test_writing_a_large_state_blocks_no_other_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            reached, go, real = threading.Event(), threading.Event(), store._files.write

            def write(state_id: str, blob: bytes) -> None:
                reached.set()
                assert go.wait(PATIENCE_S)
                real(state_id, blob)

            monkeypatch.setattr(store._files, "write", write)
            writing = asyncio.create_task(commit(store, "a", 1, b"large"))
            await until(reached.is_set)
            await store.insert(session("b"))
            assert (await found(store, "a")).turn == 0
            go.set()
            assert await writing
            assert await blob_of(store, "a") == b"large"

    asyncio.run(main())


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_file_is_on_the_disk_before_the_database_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    """Its bytes, then its name, then the row; the folder's own name when the store is created."""
    synced, real = list[str](), os.fsync

    def fsync(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        real(file)

    async def main() -> None:
        store = SQLiteStore(tmp_path / FILE, "async" if durability == "async" else "sync")
        if durability == "sync":
            folder, clock, *rest = synced
            assert (folder, rest) == (tmp_path.name, [tmp_path.name])
            assert clock.startswith(f".{FILE}-clock.")
        synced.clear()
        state = new_state("a", 1, b"large")
        store._writer.db.set_trace_callback(synced.append)
        await store.insert(advanced(session("a"), 1), state)
        store._writer.db.set_trace_callback(None)
        await store.close()
        begun = synced.index("BEGIN IMMEDIATE")
        expected = [f"{state.id}.tmp", FILES] if durability == "sync" else []
        assert synced[:begun] == expected

    monkeypatch.setattr(os, "fsync", fsync)
    with states_in_files():
        asyncio.run(main())


def test_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, seen, real = StateFiles(tmp_path / "states", sync=True), list[set[str]](), os.fsync

    def fsync(file: int) -> None:
        seen.append({path.name for path in (tmp_path / "states").iterdir()})
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write("a", b"blob")
    assert seen == [{"a.tmp"}, {"a"}]
    assert files.read("a") == b"blob"
    assert files.read("b") is None
    files.write("b", b"")
    assert (files.names(), files.read("b")) == ({"a", "b"}, b"")
    for _ in range(2):
        files.delete("b")
    assert files.read("b") is None
