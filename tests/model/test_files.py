"""Files are written atomically."""

import os
from pathlib import Path

import pytest

from model import files


def test_a_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with path.open("rb") as reader:
        files.write_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", list[bool]()
    flush = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(path.exists())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    files.write_file(path, b"content")
    assert seen == [False, True]


def test_a_mode_is_there_before_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"open")
    assert path.stat().st_mode & 0o044
    files.write_file(path, b"secret", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
