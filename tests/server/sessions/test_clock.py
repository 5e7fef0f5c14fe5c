"""Time only grows, and lifetimes do not depend on the system clock."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.sessions import clock as clocks
from server.sessions.clock import open_clock
from tests.patience import until
from tests.server.sessions.stores import FILE, opened, session
from tests.server.sessions.worlds import world

DAY = 86_400.0


@pytest.fixture(params=[-DAY, DAY], ids=["back", "forward"])
def jump(request: pytest.FixtureRequest) -> float:
    return float(request.param)


def set_clock(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the system clock forward."""
    real = time.time
    patch.setattr(time, "time", lambda: real() + seconds)


def other_start(patch: pytest.MonkeyPatch, folder: Path, uptime: float = 5.0) -> None:
    """The machine rebooted `uptime` seconds ago."""
    boot = folder / "boot_id"
    boot.write_text("another\n")
    began = time.monotonic() - uptime
    patch.setattr(clocks, "BOOT_ID", boot)
    patch.setattr(clocks, "_uptime", lambda: time.monotonic() - began)


def test_a_new_clock_shows_the_systems_time(tmp_path: Path) -> None:
    before = time.time()
    clock = open_clock(tmp_path / "clock", lambda: 0.0)
    assert before - 0.01 <= clock.now() <= time.time() + 0.01


def test_a_jump_changes_nothing_while_it_runs_and_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    clock, before = open_clock(tmp_path / "clock", lambda: 0.0), time.time()
    set_clock(monkeypatch, jump)
    assert before - 1 <= clock.now() < before + 600
    again = open_clock(tmp_path / "clock", lambda: 0.0)
    assert again.started_at == clock.started_at


def test_another_start_of_the_machine_goes_by_the_system_but_not_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clock(tmp_path / "clock", lambda: 0.0)
    other_start(monkeypatch, tmp_path)
    latest = time.time() + DAY
    assert 0 <= open_clock(tmp_path / "clock", lambda: latest).now() - latest < 600
    other_start(monkeypatch, tmp_path, 7.0)
    (tmp_path / "boot_id").write_text("a third")
    now = open_clock(tmp_path / "clock", lambda: latest - 2 * DAY).now()
    assert abs(now - time.time()) < 600


@pytest.mark.parametrize("noted", [b"", b"{}", b"[]", b"null", b'{"boot": 1, "started_at": "x"}'])
def test_an_unreadable_clock_file_is_rewritten(tmp_path: Path, noted: bytes) -> None:
    path = tmp_path / "clock"
    path.write_bytes(noted)
    clock = open_clock(path, lambda: 0.0)
    assert json.loads(path.read_bytes())["started_at"] == clock.started_at


def test_sessions_outlive_a_jump_and_end_when_their_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            kept = await made.ledger.create("me", {}, ttl_s=3600)
            over = await made.ledger.create("me", {}, ttl_s=0.001)
        set_clock(monkeypatch, jump)
        async with world(tmp_path) as made:
            await until(lambda: made.store.now() > (over.expires_at or 0.0))
            assert await made.ledger.sweep() == 1
            assert await made.store.get("session", over.id) is None
            found = await made.ledger.get("me", "session", kept.id)
            assert found.last_used_at == kept.last_used_at
            later = await made.ledger.create("me", {}, ttl_s=3600)
            assert 0 < later.created_at - kept.created_at < 600
            assert await made.ledger.sweep() == 0

    asyncio.run(main())


def test_what_is_from_the_future_erases_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store used when the clock was a day ahead, on a rebooted machine."""

    async def main() -> None:
        ahead = time.time() + DAY
        async with opened(tmp_path) as store:
            entry = replace(session("a"), created_at=ahead, last_used_at=ahead, ttl_s=60.0)
            await store.insert(entry.used(ahead))
        other_start(monkeypatch, tmp_path)
        async with opened(tmp_path) as store:
            assert ahead <= store.now() < ahead + 600
            assert (tmp_path / f"{FILE}-clock").exists()

    asyncio.run(main())
