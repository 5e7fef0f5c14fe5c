"""Deadlines and queue limits over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S, wait_until
from tests.server.api.calls import BODY, complete, stream, streamed_text, text_of
from tests.server.api.test_operations import sample
from tests.server.live import LiveServer, live_server, tiny_settings

ENDLESS: dict[str, Any] = BODY | {"max_tokens": 60_000}


@pytest.fixture(scope="module")
def strict(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with one row, and few tokens in its queue."""
    settings = tiny_settings(
        tiny_checkpoint, tmp_path_factory.mktemp("strict"), max_running=1, max_waiting_tokens=50
    )
    with live_server(settings) as running:
        yield running


def check_late(error: dict[str, str]) -> None:
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    assert "seconds" in error["message"]


def test_a_late_answer_is_an_error_that_is_not_to_be_repeated(
    client: httpx.Client, server: LiveServer
) -> None:
    before = server.num_answered("deadline_exceeded")
    late = client.post("/v1/completions", json=ENDLESS | {"timeout": 0.2})
    assert late.status_code == 504
    assert late.headers["x-should-retry"] == "false"
    check_late(late.json()["error"])
    num_late, timeout_s, text = 1, 0.2, ""
    while not text and timeout_s < PATIENCE_S:
        events = stream(client, max_tokens=60_000, timeout=timeout_s, n=3)
        check_late(events[-2]["error"])
        assert events[-1] == "[DONE]"
        text = streamed_text(events[:-1])
        num_late, timeout_s = num_late + 1, 2 * timeout_s
    assert text
    server.wait_until_idle()
    wait_until(lambda: server.num_answered("deadline_exceeded") == before + num_late)


def test_an_answer_in_time_is_as_without_a_timeout(client: httpx.Client) -> None:
    assert text_of(client, timeout=1000) == text_of(client, timeout=None) == text_of(client)


def test_a_late_turn_leaves_the_session_unchanged(client: httpx.Client, session_id: str) -> None:
    twin = client.post("/v1/sessions").json()["id"]
    for each in (session_id, twin):
        complete(client, session_id=each)
    before = client.get(f"/v1/sessions/{session_id}").json()
    turn = ENDLESS | {"session_id": session_id, "timeout": 0.2}
    assert client.post("/v1/completions", json=turn).status_code == 504
    check_late(stream(client, **turn)[-2]["error"])
    after = client.get(f"/v1/sessions/{session_id}").json()
    assert after | {"tier": before["tier"]} == before
    expected = text_of(client, session_id=twin, prompt=" sat")
    assert text_of(client, session_id=session_id, prompt=" sat") == expected


@pytest.mark.long
def test_the_servers_timeout_is_the_default_and_the_most(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, request_timeout_s=2.0)
    with live_server(settings) as hasty, hasty.client() as client:
        check_late(client.post("/v1/completions", json=ENDLESS).json()["error"])
        check_late(client.post("/v1/completions", json=ENDLESS | {"timeout": 0.2}).json()["error"])
        refused = client.post("/v1/completions", json=BODY | {"timeout": 2.5})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "timeout"


def test_a_waiting_request_expires_while_the_queue_stalls(strict: LiveServer) -> None:
    with strict.client() as busy, strict.client() as client:
        body = ENDLESS | {"stream": True}
        with busy.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            late = client.post("/v1/completions", json=BODY | {"timeout": 0.1})
            check_late(late.json()["error"])
            assert not [line for line in (next(lines) for _ in range(5)) if "error" in line]
    strict.wait_until_idle()


def test_tokens_that_wait_are_bounded(strict: LiveServer) -> None:
    with strict.client() as busy, strict.client() as client:
        body = ENDLESS | {"stream": True, "prompt": [1]}
        with busy.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()  # kept: without it the client would hang up
            next(lines)
            with busy.stream("POST", "/v1/completions", json=body | {"prompt": [1] * 40}) as queued:
                assert queued.status_code == 200
                refused = client.post("/v1/completions", json=BODY | {"prompt": [1] * 11})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_tokens_full"
        assert refused.headers["Retry-After"] == "1"
        assert sample(client, "admission_rejections_total", reason="queue_tokens_full") == 1
        never = client.post("/v1/completions", json=BODY | {"prompt": [1] * 26, "n": 2})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "prompt")
    strict.wait_until_idle()
