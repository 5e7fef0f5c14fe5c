"""Ages in words, and columns on terminals of any width."""

import re
import time

import pytest

from server.api.schemas.sessions import Session
from server.cli.tables import print_sessions

NOW = 2e9


def aged(age_s: float, session_id: str, metadata: dict[str, str]) -> Session:
    return Session(
        id=session_id,
        created_at=0,
        last_used_at=NOW - age_s,
        expires_at=None,
        ttl=None,
        turn=0,
        checkpoints=0,
        tokens=1_000_000,
        state_bytes=0,
        tier=None,
        status="idle",
        parent=None,
        metadata=metadata,
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


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
def test_ages(capsys: pytest.CaptureFixture[str], age_s: float, shown: str) -> None:
    print_sessions([aged(age_s, "x", {"a": "b"})])
    assert f"  {shown}  " in capsys.readouterr().out


def test_nothing_is_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_sessions([aged(1, "x" * 200, {"key": "y" * 200})])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[0] == "x" * 200
    assert line.split()[-1] == "key=" + "y" * 200


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_an_id_is_never_cut(
    terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "FORCE_COLOR": "1",
        "NO_COLOR": "1",
        "TERM": terminal,
        "COLUMNS": "40",
    }.items():
        monkeypatch.setenv(name, value)
    session_id = "sess_" + "x" * 32
    print_sessions([aged(1, session_id, {"key": "y" * 200})])
    lines = [re.sub("\x1b\\[.*?m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split()[:6] == [session_id, "0", "1,000,000", "0", "-", "idle"]
    assert max(map(len, lines)) == 110
    assert sum(line.count("y") for line in lines) == 201
