"""Backups on disk: complete or rejected, and nothing is overwritten."""

import asyncio
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.sessions.sqlite import backup as module
from server.sessions.sqlite.backup import CHECKSUMS, BackupError, Contents, backup, restore
from server.sessions.sqlite.snapshots import SOCKET, serve_snapshots
from tests.server.sessions.stores import (
    FILE,
    FILES,
    blob_of,
    commit,
    insert,
    opened,
    response,
    session,
    state_files,
    states_in_files,
)

BLOBS = {"a": b"state of a" * 3000, "b": b"state of b" * 5000}


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"], autouse=True)
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 20):
        yield bool(request.param)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a store: two sessions and a response."""

    async def main() -> None:
        async with opened(tmp_path / "data") as store:
            for name, blob in BLOBS.items():
                await insert(store, session(name))
                await commit(store, name, 1, blob)
            await store.insert(response("resp"))

    asyncio.run(main())
    return tmp_path / "data"


def blobs(folder: Path) -> dict[str, bytes | None]:
    async def main() -> dict[str, bytes | None]:
        async with opened(folder) as store:
            return {name: await blob_of(store, name) for name in BLOBS}

    return asyncio.run(main())


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_restored_is_what_was_backed_up(
    data: Path, tmp_path: Path, are_large: bool, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, path: Path) -> None:
        shutil.copyfile(source, path)

    if not has_links:
        monkeypatch.setattr(module, "link_or_copy", refuse)
    made = backup(data, tmp_path / "new" / "backup")
    files = tree(tmp_path / "new" / "backup")
    num_bytes = sum(map(len, files.values())) - len(files[CHECKSUMS])
    assert (made.num_sessions, made.num_responses, made.num_states) == (2, 1, 2)
    assert made.num_missing == 0
    assert len(files) == 2 + (2 if are_large else 0)
    shutil.rmtree(data)
    assert restore(tmp_path / "new" / "backup", tmp_path / "other" / "data") == Contents(
        2, 1, 2, num_bytes, 0
    )
    assert {path.name for path in (tmp_path / "other" / "data").iterdir()} == {FILE, FILES}
    assert blobs(tmp_path / "other" / "data") == BLOBS
    assert tree(tmp_path / "new" / "backup") == files  # which can be restored again


def test_the_checksums_are_those_of_sha256sum(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    command = ["sha256sum", "--check", "--strict", CHECKSUMS]
    subprocess.run(command, cwd=tmp_path / "backup", check=True, capture_output=True)
    sums = (tmp_path / "backup" / CHECKSUMS).read_text()
    assert {line.split("  ")[1] for line in sums.splitlines()} == {
        *tree(tmp_path / "backup").keys()
    } - {CHECKSUMS}


def test_a_backup_replaces_nothing(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    before = tree(tmp_path / "backup")
    with pytest.raises(BackupError, match="backup is not empty"):
        backup(data, tmp_path / "backup")
    assert tree(tmp_path / "backup") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BackupError, match="Not a directory"):
        backup(data, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(BackupError, match="no session store"):
        backup(tmp_path / "nothing", tmp_path / "empty")
    assert not (tmp_path / "nothing").exists()


def test_a_store_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    before = tree(data)
    with pytest.raises(BackupError, match="exists: restore into a folder without a store"):
        restore(tmp_path / "backup", data)
    assert tree(data) == before
    for name in (f"{FILE}-wal", f"{FILES}/state"):
        other = tmp_path / name.replace("/", "-")
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("mine")
        with pytest.raises(BackupError, match="exists"):
            restore(tmp_path / "backup", other)
        assert tree(other) == {name: b"mine"}


def test_what_else_is_in_the_folder_stays(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    other = tmp_path / "other"
    (other / FILES).mkdir(parents=True)
    (other / "compiled").write_text("mine")
    (other / SOCKET).touch()
    restore(tmp_path / "backup", other)
    assert (other / "compiled").read_text() == "mine"
    assert blobs(other) == BLOBS


def test_where_a_server_runs_nothing_is_restored(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")

    async def main() -> None:
        async with opened(tmp_path / "live") as store:
            with serve_snapshots(store, tmp_path / "live"):
                with pytest.raises(BackupError, match="a server is running on"):
                    await asyncio.to_thread(restore, tmp_path / "backup", tmp_path / "live")
                for path in (tmp_path / "live").glob(f"{FILE}*"):
                    path.rename(tmp_path / path.name)  # it runs all the same
                with pytest.raises(BackupError, match="a server is running on"):
                    await asyncio.to_thread(restore, tmp_path / "backup", tmp_path / "live")

    asyncio.run(main())


def check_refused(source: Path, data: Path, reason: str) -> None:
    with pytest.raises(BackupError, match=reason):
        restore(source, data)
    assert tree(data) == {}
    assert list(data.glob("*")) == []


def test_a_damaged_backup_is_rejected_completely(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    good = tree(tmp_path / "backup")
    for name in good.keys() - {CHECKSUMS}:
        path = tmp_path / "backup" / name
        damaged = bytearray(good[name])
        damaged[len(damaged) // 2] ^= 1
        path.unlink()  # the live store may share the file
        path.write_bytes(damaged)
        check_refused(tmp_path / "backup", tmp_path / "other", f"{path} is damaged")
        path.write_bytes(good[name][:-1])
        check_refused(tmp_path / "backup", tmp_path / "other", f"{path} is damaged")
        path.unlink()
        check_refused(tmp_path / "backup", tmp_path / "other", "No such file")
        path.write_bytes(good[name])
    restore(tmp_path / "backup", tmp_path / "other")
    assert blobs(tmp_path / "other") == BLOBS


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (None, "is not a complete backup"),
        ("", "does not list sessions.sqlite3"),
        ("0  ../outside", "which is not part of a backup"),
        ("0  /etc/passwd", "which is not part of a backup"),
        (f"0  {FILES}/../../outside", "which is not part of a backup"),
        (f"0  {FILES}/..", "which is not part of a backup"),
    ],
)
def test_the_list_of_a_backup_is_read_with_care(
    data: Path, tmp_path: Path, sums: str | None, reason: str
) -> None:
    backup(data, tmp_path / "backup")
    path = tmp_path / "backup" / CHECKSUMS
    path.unlink()
    if sums is not None:
        path.write_text(sums)
    (tmp_path / "other").mkdir()
    check_refused(tmp_path / "backup", tmp_path / "other", reason)


def test_a_database_that_is_none_of_ours_is_refused(data: Path, tmp_path: Path) -> None:
    backup(data, tmp_path / "backup")
    path = tmp_path / "backup" / FILE
    sums = (tmp_path / "backup" / CHECKSUMS).read_text()
    for content in (b"", b"no database" * 1000):
        path.unlink()
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        lines = [line for line in sums.splitlines() if not line.endswith(f"  {FILE}")]
        listed = "\n".join([*lines, f"{digest}  {FILE}"])
        (tmp_path / "backup" / CHECKSUMS).write_text(listed)
        check_refused(tmp_path / "backup", tmp_path / "other", FILE)


def test_a_backup_that_fails_is_not_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "link_or_copy", full)
    with pytest.raises(BackupError, match="No space left"):
        backup(data, tmp_path / "backup")
    assert tree(tmp_path / "backup") == {}
    check_refused(tmp_path / "backup", tmp_path / "other", "not a complete backup")
    assert blobs(data) == BLOBS


def test_states_that_the_store_has_lost_are_counted(
    data: Path, tmp_path: Path, are_large: bool
) -> None:
    lost = sorted(state_files(data))[:1]
    for name in lost:
        (data / FILES / name).unlink()
    assert backup(data, tmp_path / "backup").num_missing == (1 if are_large else 0)
    assert restore(tmp_path / "backup", tmp_path / "other").num_missing == len(lost)
    found = blobs(tmp_path / "other")
    assert found == (BLOBS | {"a": None} if are_large else BLOBS)
