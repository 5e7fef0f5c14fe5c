"""Which family a path belongs to, and the fingerprint that identifies its sessions."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import PRETRAINED, checkpoint
from model.checkpoint import CheckpointError, fingerprint, is_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept; all files are large."""
    path = tmp_path / "cache" / "digests.json"
    monkeypatch.setattr(checkpoint, "DIGESTS", path)
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", 0)
    monkeypatch.setattr(checkpoint, "SETTLED_S", -1)
    return path


def test_a_path_of_no_family_is_refused(folder: Path) -> None:
    for path, reason in (
        (folder / "nothing", "no such checkpoint folder"),
        (folder / "config.json", "not a checkpoint of a known family (heinsen, rwkv7)"),
    ):
        assert not is_checkpoint(path)
        for refuse in (checkpoint.describe, fingerprint, lambda p: checkpoint.load(p, CPU)):
            with pytest.raises(CheckpointError) as caught:
                refuse(path)
            assert str(caught.value).startswith(f"{path}: {reason}")
    assert is_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="not a checkpoint of a known family"):
        checkpoint.load(folder, CPU)


def test_the_fingerprint_is_of_config_weights_and_tokenizer(folder: Path) -> None:
    seen = [checkpoint.load(folder, CPU).fingerprint]
    assert fingerprint(folder) == seen[0]
    (folder / "chat_template.jinja").write_text("another")
    assert fingerprint(folder) == seen[0]
    for name in ("config.json", "tokenizer.json"):
        with (folder / name).open("a") as file:
            file.write("\n")
        seen.append(fingerprint(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lnorm.bias"][0] += 1e-3
    save_file(weights, folder / "model.safetensors")
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 4


def test_the_fingerprint_of_a_checkpoint_is_what_it_always_was() -> None:
    """Stored sessions refer to it: it must never change."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    digests = (hashlib.sha256((PRETRAINED / name).read_bytes()).digest() for name in names)
    assert fingerprint(PRETRAINED) == hashlib.sha256(b"".join(digests)).hexdigest()


def test_a_large_file_is_read_once(
    folder: Path, digests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(folder)
    assert len(json.loads(digests.read_bytes())) == 3
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert fingerprint(folder) == expected


def test_a_file_that_changed_is_read_again(folder: Path, digests: Path) -> None:
    path = folder / "model.safetensors"
    expected, times = fingerprint(folder), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # in place, with the same length and modification time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = fingerprint(folder)
    assert changed != expected
    digests.unlink()
    assert fingerprint(folder) == changed


def test_no_digest_is_cached_of_a_file_that_has_just_changed(
    folder: Path, digests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SETTLED_S", 1e9)
    fingerprint(folder)
    assert not digests.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"a": "xyz"}', b"\xff"])
def test_a_damaged_cache_is_none(folder: Path, digests: Path, content: bytes) -> None:
    expected = fingerprint(folder)
    digests.write_bytes(content)
    assert fingerprint(folder) == expected
    assert len(json.loads(digests.read_bytes())) == 3


def test_where_no_cache_can_be_written_there_is_none(folder: Path, digests: Path) -> None:
    digests.parent.write_text("a file where the folder would be")
    assert fingerprint(folder) == fingerprint(folder)


def test_files_larger_than_memory_are_refused_at_once(folder: Path) -> None:
    """A header may say that a sparse file is full of numbers."""
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1 << 42)
    for load in (
        lambda: checkpoint.load(folder, CPU),
        lambda: checkpoint.load_network(folder, CPU, "float32"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .* this machine's memory"):
            load()
