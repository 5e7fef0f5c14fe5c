"""A completely full disk can be freed, and a server can start on it."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from server.errors import StorageFull
from server.sessions.sqlite.pieces import overwrite, values_of
from server.sessions.sqlite.space import RESERVED_BYTES, reserve_file
from server.sessions.sqlite.store import LARGE_BYTES, SQLiteStore
from server.sessions.store import Entry, EntryKind, StoredAnswer
from tests.patience import PATIENCE_S
from tests.server.processes import server_process
from tests.server.sessions.stores import FILE, blob_of, commit, opened, response, session

DISK_BYTES = 12 << 20
BLOB = bytes(range(256)) * 1000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small separate disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"]
    try:
        subprocess.run(["mount", *options, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Another program's file fills the disk."""
    path = folder / "others"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return path


async def commit_until_full(store: SQLiteStore, name: str) -> int:
    """Turns of a session that stores all their states; returns how many there are."""
    await store.insert(session(name))
    turn = 0
    while True:
        try:
            assert await commit(store, name, turn + 1, BLOB, keep=1000)
        except StorageFull:
            return turn
        turn += 1


@pytest.mark.parametrize("is_closed", [True, False], ids=["stopped", "running"])
def test_deletes_free_a_full_disk(disk: Path, is_closed: bool) -> None:
    """A session with more states than the log has space for, between two others."""

    async def use(store: SQLiteStore, turns: int) -> None:
        fill(disk)
        assert await blob_of(store, "large") == BLOB
        assert await store.delete("session", "first")
        assert await commit(store, "last", 2, BLOB)
        assert await store.delete("session", "large")
        assert await store.get("session", "large") is None
        assert (await store.health()).unused_bytes > (turns - 1) * len(BLOB)
        for turn in range(3, turns):
            assert await commit(store, "last", turn, BLOB, keep=2)
        assert await blob_of(store, "last") == BLOB

    async def main() -> None:
        async with opened(disk) as store:
            for name in ("first", "last"):
                await store.insert(session(name))
                assert await commit(store, name, 1, BLOB)
            turns = await commit_until_full(store, "large")
            assert turns * len(BLOB) > 2 * RESERVED_BYTES
            if not is_closed:
                await use(store, turns)
                return
        assert reserve_file(disk / FILE).stat().st_size == RESERVED_BYTES
        fill(disk)
        async with opened(disk) as store:
            await use(store, turns)

    asyncio.run(main())


def test_a_turn_that_has_no_space_is_refused_and_harms_nothing(disk: Path) -> None:
    async def main() -> None:
        async with opened(disk) as store:
            await store.insert(session("a"))
            assert await commit(store, "a", 1, BLOB)
            turns = await commit_until_full(store, "large")
            assert await blob_of(store, "a") == await blob_of(store, "large") == BLOB
            others = fill(disk)
            for _ in range(3):
                with pytest.raises(StorageFull):
                    await commit(store, "large", turns + 1, BLOB, keep=1000)
            others.unlink()
            assert await commit(store, "a", 2, BLOB)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["answer", "body", "states"])
def test_values_larger_than_the_reserve_are_deleted(disk: Path, kind: str) -> None:
    """Also their bytes: of what was deleted nothing is on the disk any more."""
    secret = "what nobody may read " * (2 * RESERVED_BYTES // 21)
    owner = Entry("session", "large", "", 1.0, 2.0, metadata={"secret": "of the metadata"})

    async def main() -> None:
        async with opened(disk) as store:
            await store.insert(session("other"))
            assert await commit(store, "other", 1, BLOB)
            if kind == "body":
                await store.insert(response("large", body=json.dumps(secret)))
            else:
                await store.insert(owner)
                blob = secret.encode()[: LARGE_BYTES - 1] if kind == "states" else BLOB
                answer = StoredAnswer("key", "request", secret) if kind == "answer" else None
                for turn in range(1, 5 if kind == "states" else 2):
                    assert await commit(store, "large", turn, blob, keep=9, answer=answer)
            fill(disk)
            place: EntryKind = "response" if kind == "body" else "session"
            assert await store.get(place, "large") is not None
            assert await store.delete(place, "large")
            assert await store.get(place, "large") is None
            assert not await store.delete(place, "large")
            assert await blob_of(store, "other") == BLOB
            assert await commit(store, "other", 2, BLOB)
            others = (await store.usage("")).num_bytes
            assert others < 2 * len(BLOB)

    asyncio.run(main())
    written = b"".join(path.read_bytes() for path in disk.glob(f"{FILE}*") if path.is_file())
    assert b"what nobody may read" not in written
    assert b"of the metadata" not in written


def test_what_is_half_deleted_does_no_harm(disk: Path) -> None:
    """As after a crash between two pieces."""

    async def main() -> None:
        async with opened(disk) as store:
            await store.insert(session("large", note="x"))
            answer = StoredAnswer("key", "request", "a" * 100)
            assert await commit(store, "large", 1, BLOB, answer=answer)
            values = await store._run(lambda db: values_of(db, "session", "large"))
            assert {(value.table, value.column) for value in values} == {
                *(("checkpoints", "blob"), ("answers", "answer"), ("entries", "metadata")),
            }
            for value in values:
                await store._run(partial(overwrite, value, 0))
            assert (await store.get("session", "large")) is not None
            assert await store.find_answer("large", "key") is None
            assert await store.delete("session", "large")

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "stopped"])
def test_a_server_starts_on_a_full_disk_and_frees_it(
    disk: Path, tiny_checkpoint: Path, is_killed: bool
) -> None:
    data = disk / "data"
    with server_process(tiny_checkpoint, data) as server, server.client() as client:
        ids = [client.post("/v1/sessions", json={"prompt": "a"}).json()["id"] for _ in range(20)]
        assert client.get("/health/ready").status_code == 200
        fill(disk)
        if is_killed:
            server.kill()
        else:
            assert server.stop() == 0
    fill(disk)
    with server_process(tiny_checkpoint, data) as server, server.client() as client:
        turn = {"prompt": "a", "max_tokens": 2, "session_id": ids[0], "timeout": PATIENCE_S}
        for session_id in ids[1:]:
            assert client.delete(f"/v1/sessions/{session_id}").status_code == 200
        assert client.post("/v1/completions", json=turn).status_code == 200
