"""A log line per request: what happened, without content."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.keys import Limits, add_key
from server.logs import JSONFormatter
from tests.patience import wait_until
from tests.server.api.calls import send, stream
from tests.server.live import LiveServer, live_server, tiny_settings

SECRET = "sk-do-not-log-me"
ENDLESS = {"prompt": "the cat", "max_tokens": 50_000, "ignore_eos": True, "stream": True}


class Log:
    """Log lines of requests, by id."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def find(self, request_id: str) -> logging.LogRecord | None:
        for record in self._caplog.records:
            if getattr(record, "fields", {}).get("request_id") == request_id:
                return record
        return None

    def record(self, response: httpx.Response) -> logging.LogRecord:
        """The record of the request with this response; waits for it."""
        request_id = response.headers["X-Request-ID"]
        wait_until(lambda: self.find(request_id) is not None)
        record = self.find(request_id)
        assert record is not None
        return record

    def line(self, response: httpx.Response) -> dict[str, Any]:
        """`record` as JSON."""
        line: dict[str, Any] = json.loads(JSONFormatter().format(self.record(response)))
        return line

    @property
    def text(self) -> str:
        return "\n".join(JSONFormatter().format(record) for record in self._caplog.records)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    with caplog.at_level(logging.DEBUG):
        yield Log(caplog)


def test_a_completions_line_agrees_with_its_usage(client: httpx.Client, log: Log) -> None:
    body = {"prompt": "the cat sat", "max_tokens": 9, "ignore_eos": True, "timings": True}
    response = client.post("/v1/completions", json=body)
    answer, line = response.json(), log.line(response)
    assert (line["message"], line["method"], line["endpoint"]) == (
        *("request", "POST"),
        "/v1/completions",
    )
    assert (line["status"], line["outcome"], line["client"]) == (200, "ok", "127.0.0.1")
    assert line["tokens_in"] == answer["usage"]["prompt_tokens"]
    assert line["tokens_out"] == answer["usage"]["completion_tokens"] == 9
    assert line["tokens_cached"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    for name in ("queue_s", "prefill_s", "first_token_s"):
        assert line[name] == pytest.approx(answer["timings"][name], abs=1e-6)
    assert line["total_s"] >= answer["timings"]["total_s"] >= line["first_token_s"] > 0
    assert {"session", "error", "key"}.isdisjoint(line)


def test_a_turns_line_names_its_session(client: httpx.Client, log: Log, session_id: str) -> None:
    for position in (0, 25):
        body = {"prompt": [1], "max_tokens": 24, "ignore_eos": True, "session_id": session_id}
        response = client.post("/v1/completions", json=body)
        line = log.line(response)
        assert line["session"] == session_id
        assert (line["tokens_in"], line["tokens_cached"]) == (position + 1, position)
    line = log.line(client.get(f"/v1/sessions/{session_id}"))
    assert (line["endpoint"], line["session"]) == ("/v1/sessions/{session_id}", session_id)
    body = {"prompt": "a", "session_id": session_id, "expected_turn": 7}
    line = log.line(client.post("/v1/completions", json=body))
    assert (line["status"], line["error"]) == (409, "turn_mismatch")
    assert line["session"] == session_id


def test_a_client_that_leaves_is_noted(client: httpx.Client, log: Log) -> None:
    with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        next(response.iter_lines())
    line = log.line(response)
    assert (line["status"], line["outcome"]) == (200, "cancelled")
    assert line["tokens_out"] > 0
    assert 0 < line["first_token_s"] <= line["total_s"]


def test_an_error_in_a_stream_is_noted(client: httpx.Client, log: Log) -> None:
    response = client.post("/v1/completions", json=ENDLESS | {"timeout": 0.05})
    line = log.line(response)
    assert (line["status"], line["outcome"], line["error"]) == (
        *(200, "deadline_exceeded"),
        "deadline_exceeded",
    )


def test_a_detached_turn_is_logged_at_its_end(
    server: LiveServer, client: httpx.Client, log: Log
) -> None:
    body, num_answered = ENDLESS | {"resumable": True}, server.num_answered("ok")
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    stream_id = response.headers["X-Stream-ID"]
    wait_until(lambda: server.num_answered("ok") == num_answered + 1)
    assert log.find(response.headers["X-Request-ID"]) is None
    client.post(f"/v1/streams/{stream_id}/cancel")
    line = log.line(response)
    assert (line["outcome"], line["status"]) == ("cancelled", 200)
    assert line["tokens_out"] > 0
    server.wait_until_idle()


def test_probes_are_logged_at_level_debug(client: httpx.Client, log: Log) -> None:
    for path, level in (
        ("/health/live", logging.DEBUG),
        ("/metrics", logging.DEBUG),
        ("/v1/models", logging.INFO),
        ("/v1/none", logging.INFO),
    ):
        assert log.record(client.get(path)).levelno == level, path


def test_the_log_has_the_names_of_keys_and_never_keys_prompts_or_texts(
    tiny_checkpoint: Path, tmp_path: Path, log: Log
) -> None:
    key_file = tmp_path / "keys.json"
    _, named = add_key(key_file, "billing", Limits())
    settings = tiny_settings(
        tiny_checkpoint, tmp_path, api_key=(SECRET,), key_file=key_file, log_level="debug"
    )
    with live_server(settings) as running, running.client() as client:
        client.headers["Authorization"] = f"Bearer {named}"
        body = {"prompt": "unmistakable words", "max_tokens": 20, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
        assert log.line(response)["key"] == "billing"
        text = response.json()["choices"][0]["text"]
        client.headers["Authorization"] = f"Bearer {SECRET}"
        assert log.line(client.get("/v1/models"))["key"].startswith("key_")
        assert stream(client, prompt="unmistakable words", stop=["nevermore"])
        client.post("/v1/completions", json={"prompt": "unmistakable", "tempo": "words"})
        wrong = client.get("/v1/models", headers={"Authorization": "Bearer sk-wrong-key"})
        assert (wrong.status_code, log.line(wrong)["error"]) == (401, "invalid_api_key")
    for word in (SECRET, named, "sk-wrong", "unmistakable", "nevermore", json.dumps(text)[1:-1]):
        assert word not in log.text


def test_lines_of_refused_requests_are_limited(
    server: LiveServer, client: httpx.Client, log: Log
) -> None:
    refused = client.get("/v1/models", headers={"Host": "evil.example"})
    answered = client.get("/v1/models")
    for response, kind in ((refused, "status 421"), (answered, None)):
        assert log.record(response).__dict__["limited"] == kind
    with send(server.url, ENDLESS, host="localhost", **{"content-length": "x"}) as connection:
        assert connection.recv(12) == b"HTTP/1.1 400"
    [record] = [r for r in log._caplog.records if r.getMessage() == "connection refused"]
    assert record.__dict__["fields"] == {"error": "invalid_http", "client": "127.0.0.1"}
    assert record.__dict__["limited"] == "connection refused: invalid_http"


@pytest.mark.long
@pytest.mark.parametrize(
    ("trusted", "expected"),
    [("127.0.0.1", "203.0.113.7"), ("10.0.0.0/8", "127.0.0.1"), ("*", "203.0.113.7")],
)
def test_a_trusted_proxy_says_who_the_client_is(
    tiny_checkpoint: Path, tmp_path: Path, log: Log, trusted: str, expected: str
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, trusted_proxies=trusted)
    with live_server(settings) as running, running.client() as client:
        response = client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.7"})
        assert log.line(response)["client"] == expected


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_proxy_may_leave_the_path_before_ours(
    tiny_checkpoint: Path, tmp_path: Path, log: Log, prefix: str
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, root_path="/llm", api_key=(SECRET,))
    with live_server(settings) as running, running.client() as client:
        assert client.get(f"{prefix}/health/ready").status_code == 200
        assert client.get(f"{prefix}/metrics").status_code == 401
        assert client.get(f"{prefix}/v1/models").status_code == 401
        client.headers["Authorization"] = f"Bearer {SECRET}"
        models = client.get(f"{prefix}/v1/models")
        assert models.status_code == 200
        assert log.line(models)["endpoint"] == "/v1/models"
        assert client.get(f"{prefix}/metrics").status_code == 200
        assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert client.get("/other/v1/models").status_code == 404
        body = {"prompt": "a", "max_tokens": 1}
        assert client.post(f"{prefix}/v1/completions", json=body).status_code == 200
