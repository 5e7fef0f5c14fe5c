"""Valid and invalid requests that schemathesis generates from the documentation.

Every response is documented, and the server logs no internal error.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KEY = "the-key"
SEED = "7"


def serve(folder: Path, **changes: object) -> Any:
    """A server on which no request takes long."""
    settings = tiny_settings(
        make_checkpoint(folder / "model"),
        folder / "data",
        model_name="latentd",
        max_tokens_limit=64,
        max_prompt_tokens=500,
        default_max_tokens=8,
        default_chat_max_tokens=8,
        max_n=2,
        request_timeout_s=10,
        grammar_timeout_s=1,
        session_ttl_s=86_400,
        **changes,
    )
    return live_server(settings)


def run(
    server: LiveServer,
    report: Path,
    num_examples: int,
    *flags: str,
    hooks: str = "schemathesis_checks",
) -> dict[str, Any]:
    """The report of a run with this many examples per call and phase."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli"),
        *("--config-file", str(HERE / "schemathesis.toml"), "run", f"{server.url}/openapi.json"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(num_examples)),
        *("--mode", "all", "--checks", "all", "--seed", SEED, "--continue-on-failure"),
        *("--request-timeout", str(PATIENCE_S), "--max-response-time", str(PATIENCE_S)),
        *("--suppress-health-check", "too_slow"),
        *("--generation-database", "none"),
        *("--report", "json", "--report-json-path", str(report), *flags),
    ]
    extra = {"SCHEMATHESIS_HOOKS": f"tests.server.api.{hooks}", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        command, cwd=report.parent, env=os.environ | extra, capture_output=True, text=True
    )
    assert report.exists(), shown.stdout + shown.stderr
    assert shown.returncode == 0, shown.stdout
    reported = json.loads(report.read_text())
    print(reported["test_cases"], f"{reported['running_time']:.0f} s")
    return dict(reported)


def check(reported: dict[str, Any], caplog: pytest.LogCaptureFixture, least: int) -> None:
    assert reported["complete"]
    assert reported["operations"]["tested"] == reported["operations"]["selected"]
    assert reported["test_cases"]["unique_failures"] == reported["test_cases"]["errored"] == 0
    assert reported["test_cases"]["generated"] >= least
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("key", [None, KEY])
def test_a_few_requests_to_every_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str | None
) -> None:
    header = () if key is None else ("-H", f"Authorization: Bearer {key}")
    with serve(tmp_path, api_key=(key,) if key else ()) as running:
        reported = run(running, tmp_path / "report.json", 20, *header)
    check(reported, caplog, 2000)


STREAMING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def test_streams(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = [flag for path in STREAMING for flag in ("--include-path", path)]
    with serve(tmp_path) as running:
        reported = run(
            *(running, tmp_path / "report.json", 100, *flags, "--mode", "positive"),
            hooks="schemathesis_streams",
        )
        ok = running.service.metrics.requests_total.labels
        streamed = [ok(endpoint=path, outcome="ok")._value.get() for path in STREAMING]
    check(reported, caplog, 300)
    assert min(streamed) > 10


@pytest.mark.long
def test_hundreds_of_requests_to_every_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(tmp_path) as running:
        reported = run(running, tmp_path / "report.json", 150)
    check(reported, caplog, 5000)
