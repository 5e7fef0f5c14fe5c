"""The key file: its content and permissions, and that no change is lost."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from server.keys import Key, KeyFileError, Limits, add_key, digest, read_keys, revoke_key


def add_many(path: Path, prefix: str) -> None:
    for number in range(8):
        add_key(path, f"{prefix}{number}", Limits())


def refusal(path: Path) -> str:
    with pytest.raises(KeyFileError) as caught:
        read_keys(path)
    return str(caught.value)


def test_a_key_is_in_the_file_by_its_hash_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, secret = add_key(path, "app", Limits(requests_per_minute=3))
    assert secret.startswith("lk_")
    assert len(secret) == 3 + 43  # 256 bits in base64
    assert key.hash == digest(secret) == hashlib.sha256(secret.encode()).hexdigest()
    assert key.id == f"key_{key.hash[:32]}"
    assert read_keys(path) == [key]
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    _, other = add_key(path, "other", Limits())
    assert other != secret
    assert [known.name for known in read_keys(path)] == ["app", "other"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_is_revoked_by_name_or_id(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second, third = (add_key(path, name, Limits())[0] for name in "abc")
    assert revoke_key(path, "b") == second
    assert revoke_key(path, first.id) == first
    assert read_keys(path) == [third]
    with pytest.raises(KeyFileError, match="there is no key 'b'"):
        revoke_key(path, "b")
    assert read_keys(path) == [third]


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "ä", "x" * 65])
def test_a_bad_name_makes_no_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="not a valid key name"):
        add_key(tmp_path / "keys.json", name, Limits())
    assert list(tmp_path.iterdir()) == []


def test_a_name_means_one_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "app", Limits())
    for name in ("app", key.id):
        with pytest.raises(KeyFileError, match="already"):
            add_key(path, name, Limits())
    assert read_keys(path) == [key]


def test_changes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=add_many, args=(path, prefix)) for prefix in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert {key.name for key in read_keys(path)} == {f"{p}{n}" for p in "abc" for n in range(8)}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "keys.json", tmp_path / "link.json"
    link.symlink_to(path)
    key, _ = add_key(link, "app", Limits())
    assert link.is_symlink()
    assert read_keys(path) == [key]


KEY = {"name": "a", "hash": "0" * 64, "created_at": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "object"),
        ('{"version": 2}', "version"),
        (json.dumps({"keys": [KEY | {"hash": "no"}]}), "keys.0.hash"),
        (json.dumps({"keys": [KEY | {"extra": 1}]}), "keys.0.extra"),
        (json.dumps({"keys": [KEY | {"limits": {"tokens_per_minute": 0}}]}), "tokens_per_minute"),
        (json.dumps({"keys": [KEY, KEY | {"hash": "1" * 64}]}), "the same name"),
        (json.dumps({"keys": [KEY, KEY | {"name": "b"}]}), "the same hash"),
    ],
)
def test_a_malformed_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    for message in (refusal(path), _change_refusal(path)):
        assert message.startswith(f"{path}: ")
        assert reason in message
        assert "\n" not in message
    assert path.read_text() == content


def _change_refusal(path: Path) -> str:
    with pytest.raises(KeyFileError) as caught:
        add_key(path, "new", Limits())
    return str(caught.value)


def test_a_file_by_hand_needs_no_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [KEY]}))
    assert read_keys(path) == [Key(name="a", hash="0" * 64, created_at=1)]


def test_a_file_that_cannot_be_read_or_made_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"
    with pytest.raises(KeyFileError, match="No such file"):
        revoke_key(tmp_path / "none", "a")
    with pytest.raises(KeyFileError, match="No such file"):
        add_key(tmp_path / "no folder" / "keys.json", "a", Limits())
    assert list(tmp_path.iterdir()) == []
