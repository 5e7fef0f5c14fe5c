"""The commands, on a tiny model."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PROGRAM_S
from tests.server.live import LiveServer, live_server, tiny_settings

LOAD = ("--prompt", "uniform:2:9", "--output", "uniform:2:9")


@pytest.fixture
def server(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tiny_settings(tiny_checkpoint, tmp_path / "data")) as running:
        yield running


def run(*arguments: str, status: int = 0) -> str:
    """The command's output."""
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("how", [("--rate", "50"), ("--concurrency", "3")])
def test_bench_resumes_sessions_and_erases_them(server: LiveServer, how: tuple[str, str]) -> None:
    shown = run(
        *("bench", server.url, *how, "--requests", "30", *LOAD),
        *("--sessions", "3", "--resume", "0.6", "--slo", "ttft=60s"),
    )
    assert "30 requests" in shown
    assert "(0 resumed" not in shown
    assert "100.0% of all" in shown
    server.wait_until_idle()
    with server.client() as client:
        assert client.get("/v1/sessions").json()["data"] == []


@pytest.mark.long
def test_errors_are_counted_by_kind(server: LiveServer) -> None:
    shown = run("bench", server.url, "--requests", "5", "--model", "nobody", *LOAD, status=1)
    assert "model_not_found" in shown
    assert "Traceback" not in shown


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("bench", "http://127.0.0.1:1"), "no server responds at http://127.0.0.1:1"),
        (("bench", "127.0.0.1:1"), "no server responds"),
        (("bench", "http://x", "--slo", "ttft=1"), "'ttft=1'"),
        (("bench", "http://x", "--prompt", "zipf:1"), "'zipf:1'"),
        (("bench", "http://x", "--rate", "1", "--concurrency", "1"), "not both"),
        (("bench", "http://x", "--resume", "0.5"), "--sessions"),
        (("compare", "http://x"), "at least two"),
    ],
)
def test_what_is_wrong_is_named(arguments: tuple[str, ...], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        env={"COLUMNS": "200", "PATH": ""},
    )
    assert done.returncode in (1, 2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_soak_ends_with_slopes(tiny_checkpoint: Path) -> None:
    shown = run(
        *("soak", "--checkpoint", str(tiny_checkpoint), "--minutes", "0.1", "--rate", "10"),
        *("--warm-up-minutes", "0.05", "--every-s", "0.1", "--sessions", "2", *LOAD),
    )
    for name in ("resident MiB", "cached MiB", "descriptors", "threads"):
        assert f"{name} an hour" in shown
    assert "states in host memory:" in shown


@pytest.mark.long
def test_sessions_are_grown_resumed_and_counted(tiny_checkpoint: Path) -> None:
    checkpoint = ("--checkpoint", str(tiny_checkpoint))
    shown = run("long-session", "--tokens", "3000", "--turns", "1", "--rounds", "2", *checkpoint)
    for name in ("3,000 tokens:", "fork", "rewind", "restart"):
        assert name in shown
    shown = run("many-sessions", "--sessions", "40", "--probes", "10", *checkpoint)
    assert "40 sessions" in shown


@pytest.mark.external  # draws: only that lane installs matplotlib
def test_capacity_is_the_highest_rate_that_holds(server: LiveServer, tmp_path: Path) -> None:
    rates = ("--rate", "1", "--most-rate", "3", "--seconds", "1", "--fewest", "2")
    patient = ("--slo", "ttft=3600s", "--slo", "itl=3600s", "--out", str(tmp_path))
    assert "3 requests/s hold" in run("capacity", server.url, *rates, *patient, *LOAD)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(trial["rate"], trial["holds"]) for trial in result["trials"]] == [
        (1, True),
        (2, True),
        (3, True),
    ]
    assert result["rate"] == 3
    assert (tmp_path / "capacity.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_capacity_that_is_none_is_said_so(server: LiveServer) -> None:
    never = ("--slo", "e2e=0.001us", "--seconds", "1", "--fewest", "1", "--precision", "1")
    assert "meet the objectives" in run("capacity", server.url, *never, *LOAD, status=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("host", "--rows", "1", "--tokens", "5"), "tokens/s"),
        (("drift", "--tokens", "100000", "--steps", "1000"), "100,000"),
        (("precision", "README.md", "--exact-tokens", "1024"), "1,024"),
        (("commits", "--turns", "2", "--together", "2", "--rounds", "1"), "sync"),
        (("http", "--streams", "2", "--tokens", "20", "--rounds", "1"), "2 streams: bare engine"),
        (("front", "--streams", "2", "--tokens", "5", "--rate", "1000"), "completions, 1 worker"),
        (("freeze", "a prompt"), "longest wait"),
    ],
)
def test_parts_say_what_was_called_and_where(arguments: tuple[str, ...], named: str) -> None:
    shown = run(*arguments)
    assert shown.startswith(f"python -m loadtest {shlex.join(arguments)}\n")
    assert "load average" in shown
    assert named in shown
