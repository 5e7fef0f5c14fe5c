"""How old a session is, in words."""

import time

import pytest

from server.api.schemas import Session
from server.cli.tables import print_sessions


@pytest.mark.parametrize(
    ("age_s", "shown"),
    [
        (-100, "0 s ago"),
        (59, "59 s ago"),
        (3599, "59 min ago"),
        (86_399, "23 h ago"),
        (1_000_000, "11 d ago"),
    ],
)
def test_ages(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    age_s: float,
    shown: str,
) -> None:
    now = 2e9
    monkeypatch.setattr(time, "time", lambda: now)
    session = Session(
        id="x" * 200,
        created_at=0,
        last_used_at=now - age_s,
        expires_at=None,
        ttl=None,
        turn=0,
        checkpoints=0,
        tokens=0,
        state_bytes=0,
        tier=None,
        status="idle",
        parent=None,
        metadata={"key": "y" * 200},
    )
    print_sessions([session])
    line = capsys.readouterr().out.splitlines()[1]
    assert f"  {shown}  " in line
    assert line.split()[0] == "x" * 200, "what is not for a terminal is not cut"
    assert line.split()[-1] == "key=" + "y" * 200
