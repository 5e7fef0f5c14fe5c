"""`latentd keys`, as a user would call it."""

from pathlib import Path

import pytest

from server.keys import Limits, digest, read_keys
from tests.server.cli.commands import latentd, refused, stdout_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_new_key_is_printed_alone_and_once(file: Path) -> None:
    done = latentd("keys", "add", "app", "--requests-per-minute", 5, "--file", file)
    assert done.exit_code == 0
    [key] = read_keys(file)
    assert digest(done.stdout.strip()) == key.hash
    assert key.id in done.stderr
    assert key.limits == Limits(requests_per_minute=5)
    assert done.stdout.strip() not in stdout_of("keys", "list", "--file", file)


def test_the_list_shows_names_and_limits(file: Path) -> None:
    limits = ("--tokens-per-minute", 12_000, "--concurrent-requests", 4)
    latentd("keys", "add", "app", *limits, "--file", file)
    latentd("keys", "add", "other", LATENTD_KEY_FILE=str(file))
    head, app, other = stdout_of("keys", "list", LATENTD_KEY_FILE=str(file)).splitlines()
    assert head.split()[:2] == ["name", "id"]
    first, second = read_keys(file)
    assert app.split()[:2] == ["app", first.id]
    assert app.split()[-4:] == ["-", "12,000", "4", "-"]
    assert other.split()[:2] == ["other", second.id]
    assert other.split()[-4:] == ["-", "-", "-", "-"]


def test_a_revoked_key_is_removed(file: Path) -> None:
    latentd("keys", "add", "app", "--file", file)
    [key] = read_keys(file)
    assert stdout_of("keys", "revoke", key.id, "--file", file) == f"app {key.id}\n"
    assert read_keys(file) == []
    assert "there is no key 'app'" in refused("keys", "revoke", "app", "--file", file)


def test_refusals_are_one_line(file: Path) -> None:
    latentd("keys", "add", "app", "--file", file)
    assert "already" in refused("keys", "add", "app", "--file", file)
    assert "not a valid key name" in refused("keys", "add", "a b", "--file", file)
    assert "No such file" in refused("keys", "list", "--file", file.with_name("none"))
    file.write_text("{}x")
    assert str(file) in refused("keys", "list", "--file", file)


def test_the_file_must_be_named() -> None:
    done = latentd("keys", "list")
    assert done.exit_code == 2
    assert "--file" in done.stderr
