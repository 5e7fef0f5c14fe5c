"""Every invalid request gets an error object with the right status that names what was wrong."""

from typing import Any

import httpx
import pytest

from tests.server.api.calls import BODY, text_of
from tests.server.live import LiveServer

LONG = "x" * 5000

WRONG_BODIES: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": 5}, 400, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, 400, "prompt[1]", "invalid_value"),
    ({"prompt": ["a", 1]}, 400, "prompt[1]", "invalid_value"),
    ({"prompt": [[1], "a"]}, 400, "prompt[1]", "invalid_value"),
    ({"prompt": [1, -1]}, 400, "prompt[1]", "invalid_value"),
    ({"prompt": [True]}, 400, "prompt[0]", "invalid_value"),
    ({"prompt": [300]}, 400, "prompt", "invalid_value"),
    ({"prompt": []}, 400, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 300}, 400, "prompt", "invalid_value"),
    ({"prompt": [1] * 2001}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": LONG}, 400, "prompt", "context_length_exceeded"),
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"model": 1}, 400, "model", "invalid_value"),
    ({"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": "16"}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**9}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, 400, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({"temperature": True}, 400, "temperature", "invalid_value"),
    ({"top_p": -0.1}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.1}, 400, "top_p", "invalid_value"),
    ({"top_k": -2}, 400, "top_k", "invalid_value"),
    ({"min_p": 2}, 400, "min_p", "invalid_value"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "invalid_value"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty", "invalid_value"),
    ({"penalty_decay": 1.5}, 400, "penalty_decay", "invalid_value"),
    ({"presence_penalty": -3}, 400, "presence_penalty", "invalid_value"),
    ({"logit_bias": {"300": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"cat": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias[1]", "invalid_value"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": [1]}, 400, "logit_bias", "invalid_value"),
    ({"seed": 2**64}, 400, "seed", "invalid_value"),
    ({"seed": "x"}, 400, "seed", "invalid_value"),
    ({"seed": 1e30}, 400, "seed", "invalid_value"),
    ({"prompt": [1.0, 1.5]}, 400, "prompt[1]", "invalid_value"),
    ({"timeout": 0}, 400, "timeout", "invalid_value"),
    ({"timeout": -1.5}, 400, "timeout", "invalid_value"),
    ({"timeout": "5"}, 400, "timeout", "invalid_value"),
    ({"timeout": True}, 400, "timeout", "invalid_value"),
    ({"stop": ""}, 400, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, 400, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 17}, 400, "stop", "invalid_value"),
    ({"stop": 1}, 400, "stop", "invalid_value"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 17}, 400, "n", "invalid_value"),
    ({"stream": "yes"}, 400, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    (
        {"stream": True, "stream_options": {"x": 1}},
        400,
        "stream_options.x",
        "unknown_parameter",
    ),
    ({"logprobs": 21}, 400, "logprobs", "invalid_value"),
    ({"logprobs": 20, "max_tokens": 60_000}, 400, "logprobs", "invalid_value"),
    ({"logprobs": -1}, 400, "logprobs", "invalid_value"),
    ({"logprobs": True}, 400, "logprobs", "invalid_value"),
    ({"best_of": 17}, 400, "best_of", "invalid_value"),
    ({"best_of": 2, "stream": True}, 400, "best_of", "invalid_value"),
    ({"suffix": "end"}, 400, "suffix", "unsupported_parameter"),
    ({"min_tokens": 25}, 400, "min_tokens", "invalid_value"),
    ({"stop_token_ids": [300]}, 400, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [1] * 257}, 400, "stop_token_ids", "invalid_value"),
    ({"resumable": True}, 400, "resumable", "invalid_value"),
    ({"wrong": 1}, 400, "wrong", "unknown_parameter"),
    ({"session_id": "sess_unknown"}, 404, "session_id", "session_not_found"),
    ({"session_id": "\0"}, 404, "session_id", "session_not_found"),
]


def check(response: httpx.Response, status: int, param: str | None, code: str) -> str:
    """The message of a well-formed error object."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], str(error["code"])) == (param, code), error
    assert len(response.content) < 1000
    return str(error["message"])


@pytest.mark.parametrize(("changes", "status", "param", "code"), WRONG_BODIES)
def test_wrong_bodies(
    client: httpx.Client, changes: dict[str, Any], status: int, param: str, code: str
) -> None:
    message = check(client.post("/v1/completions", json=BODY | changes), status, param, code)
    assert message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "missing_required_parameter"),
        (b"{", 400, "invalid_json"),
        (b'{"prompt": "a",}', 400, "invalid_json"),
        (b"[]", 400, "invalid_body"),
        (b'"text"', 400, "invalid_body"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_body"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400, "invalid_body"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_wrong_content(client: httpx.Client, content: bytes, status: int, code: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=content, headers=headers)
    check(response, status, None, code)


def test_a_body_without_declared_length_is_bounded_too(client: httpx.Client) -> None:
    def parts() -> Any:
        for _ in range(20):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=parts(), headers=headers)
    check(response, 413, None, "body_too_large")


@pytest.mark.parametrize("value", ['{"prompt": "\\ud800"}', '{"prompt": "a", "stop": "\\udc00"}'])
def test_half_a_surrogate_pair_is_not_text(client: httpx.Client, value: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=value.encode(), headers=headers)
    assert "surrogate" in check(
        response, 400, "stop" if "stop" in value else "prompt", "invalid_value"
    )


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_type(client: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    message = check(response, 415, None, "unsupported_media_type")
    assert "application/json" in message


def test_a_missing_prompt_is_named(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"max_tokens": 1})
    check(response, 400, "prompt", "missing_required_parameter")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/sessions/", 404, "not_found"),
        ("POST", "/v1/sessions/", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("OPTIONS", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/sessions/sess_x", 404, "session_not_found"),
        ("DELETE", "/v1/sessions/sess_x", 404, "session_not_found"),
        ("GET", "/v1/sessions/%ed%a0%80", 404, "session_not_found"),
        ("GET", "/v1/sessions?limit=0", 400, "invalid_value"),
        ("GET", "/v1/sessions?after=sess_x", 400, "invalid_value"),
    ],
)
def test_wrong_addresses(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    check(response, status, response.json()["error"]["param"], code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/models", "HEAD, GET"),
        ("PUT", "/v1/sessions", "HEAD, GET, POST"),
        ("PATCH", "/v1/sessions/sess_x", "HEAD, GET, DELETE"),
        ("POST", "/health/live", "HEAD, GET"),
        ("OPTIONS", "/v1/sessions/import", "POST"),
        ("DELETE", "/docs", "HEAD, GET"),
    ],
)
def test_a_wrong_method_gets_the_allowed_ones(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)
    check(response, 405, None, "method_not_allowed")
    assert response.headers["Allow"] == allowed


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/v1/models", "/v1/sessions", "/v1/none", "/docs"]
)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert head.content == b""
    assert head.status_code == whole.status_code
    for name in ("content-type", "content-length"):
        assert head.headers[name] == whole.headers[name]
    assert client.head("/v1/completions").status_code == 405


def test_a_full_queue_is_refused_whole(server: LiveServer, client: httpx.Client) -> None:
    flood = {"prompt": ["the"] * 250, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with server.client() as busy, busy.stream("POST", "/v1/completions", json=flood) as running:
        assert running.status_code == 200
        refused = client.post("/v1/completions", json=BODY | {"prompt": ["a"] * 200})
        check(refused, 429, None, "queue_full")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
    server.wait_until_idle()
    assert text_of(client)
    rejections = 'latentd_admission_rejections_total{reason="queue_full"} 1.0'
    assert rejections in client.get("/metrics").text


def test_an_empty_prompt_needs_something_to_continue(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json=BODY | {"prompt": []})
    assert "at least one token" in check(response, 400, "prompt", "invalid_value")


def test_request_ids_are_adopted_or_generated(client: httpx.Client) -> None:
    given = client.get("/health/live", headers={"X-Request-ID": "abc-1"})
    assert given.headers["X-Request-ID"] == "abc-1"
    made = client.get("/nowhere", headers={"X-Request-ID": "not a good one"})
    assert made.headers["X-Request-ID"].startswith("req_")
