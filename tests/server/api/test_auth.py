"""Keys: who has none gets nothing, and nobody sees another's sessions."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.api.calls import BODY, complete
from tests.server.live import LiveServer, live_server, tiny_settings


@pytest.fixture(scope="module")
def guarded(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        api_key=("alpha", "beta"),
        max_sessions_per_key=3,
        max_bytes_per_key=80_000,
        session_ttl_s=3600,
    )
    with live_server(settings) as running:
        yield running


@contextmanager
def client_with(server: LiveServer, key: str | None) -> Iterator[httpx.Client]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
        yield client


CALLS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/x"),
    ("POST", "/v1/responses/x/cancel"),
    ("DELETE", "/v1/responses/x"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/streams/x"),
    ("POST", "/v1/streams/x/cancel"),
    ("DELETE", "/v1/streams/x"),
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions"),
    ("GET", "/v1/sessions/x"),
    ("GET", "/v1/sessions/x/turns"),
    ("GET", "/v1/sessions/x/state"),
    ("POST", "/v1/sessions/x/fork"),
    ("POST", "/v1/sessions/x/rewind"),
    ("POST", "/v1/sessions/import"),
    ("DELETE", "/v1/sessions/x"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic alpha"])
def test_without_a_known_key_nothing_is_done(
    guarded: LiveServer, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    with guarded.client() as client:
        response = client.request(method, path, headers=headers, json=BODY)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "alpha" not in response.text


def test_every_call_is_guarded(guarded: LiveServer) -> None:
    with guarded.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
    described = {
        (method.upper(), re.sub("{[a-z_]+}", "x", path))
        for path, methods in paths.items()
        for method in methods
        if path.startswith(("/v1", "/token", "/detokenize"))
    }
    assert described == set(CALLS)


def test_nobody_sees_anothers_sessions(guarded: LiveServer) -> None:
    with client_with(guarded, "alpha") as mine, client_with(guarded, "beta") as other:
        session_id = mine.post("/v1/sessions").json()["id"]
        complete(mine, session_id=session_id)
        listed = other.get("/v1/sessions").json()["data"]
        assert session_id not in [session["id"] for session in listed]
        answers = [
            other.get(f"/v1/sessions/{session_id}"),
            other.get(f"/v1/sessions/{session_id}/turns"),
            other.get(f"/v1/sessions/{session_id}/state"),
            other.post(f"/v1/sessions/{session_id}/fork"),
            other.post(f"/v1/sessions/{session_id}/rewind", json={"turn": 0}),
            other.post("/v1/completions", json=BODY | {"session_id": session_id}),
            other.delete(f"/v1/sessions/{session_id}"),
        ]
        assert {answer.status_code for answer in answers} == {404}
        codes = {answer.json()["error"]["code"] for answer in answers}
        assert codes == {"session_not_found"}
        assert mine.get(f"/v1/sessions/{session_id}").json()["turn"] == 1
        assert mine.delete(f"/v1/sessions/{session_id}").status_code == 200


def test_quotas_are_per_key(guarded: LiveServer) -> None:
    with client_with(guarded, "alpha") as mine, client_with(guarded, "beta") as other:
        ids = [mine.post("/v1/sessions").json()["id"] for _ in range(3)]
        refused = mine.post("/v1/sessions")
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            429,
            "session_quota_exceeded",
        )
        assert refused.headers["x-should-retry"] == "false"
        theirs = other.post("/v1/sessions").json()["id"]
        statuses = [
            mine.post("/v1/completions", json=BODY | {"session_id": session_id}).status_code
            for session_id in ids
            for _ in range(6)
        ]
        assert set(statuses) == {200, 429}
        assert statuses == sorted(statuses)
        complete(other, session_id=theirs)
        for session_id in ids:
            assert mine.delete(f"/v1/sessions/{session_id}").status_code == 200
        assert mine.post("/v1/sessions").status_code == 201
        other.delete(f"/v1/sessions/{theirs}")


def test_the_servers_ttl_is_the_longest(guarded: LiveServer) -> None:
    with client_with(guarded, "beta") as client:
        session = client.post("/v1/sessions").json()
        assert (session["ttl"], session["expires_at"]) == (3600, session["created_at"] + 3600)
        refused = client.post("/v1/sessions", json={"ttl": 3601})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ttl")
        assert (
            client.post(f"/v1/sessions/{session['id']}/fork", json={"ttl": 60}).json()["ttl"] == 60
        )


def test_the_official_client_shows_its_key(guarded: LiveServer) -> None:
    url = f"{guarded.url}/v1"
    with openai.OpenAI(base_url=url, api_key="alpha", max_retries=0) as client:
        assert client.models.list().data
    with (
        openai.OpenAI(base_url=url, api_key="gamma", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
