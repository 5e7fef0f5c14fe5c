"""API keys: no access without one, and no access to another key's sessions."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from model.files import write_file
from server.api.auth import KeyRing
from server.errors import Unauthorized
from server.keys import Limits, add_key, revoke_key
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until
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
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
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
    ("GET", "/v1/usage"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
]


@pytest.mark.long
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


LIMITED = {
    *(("post", path) for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")),
    *(("post", path) for path in ("/tokenize", "/detokenize", "/v1/sessions")),
    *(("post", f"/v1/sessions/{call}") for call in ("import", "{session_id}/fork")),
    *(("post", "/v1/sessions/{session_id}/rewind"), ("get", "/v1/sessions/{session_id}/state")),
    ("get", "/v1/responses/{response_id}"),
}
"""Requests that read, copy or store much, which have limits."""


def test_every_call_is_guarded(guarded: LiveServer) -> None:
    with client_with(guarded, "alpha") as client:
        described = client.get("/openapi.json").json()
        paths = described["paths"]
    [scheme] = described["components"]["securitySchemes"].items()
    assert (scheme[0], scheme[1]["type"], scheme[1]["scheme"]) == ("APIKey", "http", "bearer")
    for path, methods in paths.items():
        for method, call in methods.items():
            is_open = path.startswith("/health")
            assert call.get("security") == (None if is_open else [{"APIKey": []}]), path
            assert ("401" in call["responses"]) is not is_open
            assert ("429" in call["responses"]) is ((method, path) in LIMITED)
    calls = {
        (method.upper(), re.sub("{[a-z_]+}", "x", path))
        for path, methods in paths.items()
        for method in methods
        if path.startswith(("/v1", "/token", "/detokenize"))
    }
    assert calls == set(CALLS)


OTHER_PATHS = ["/docs", "/redoc", "/openapi.json", "/metrics", "/v1/none", "/health/", "/"]


@pytest.mark.parametrize("path", OTHER_PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_is_no_call_is_guarded_too(guarded: LiveServer, method: str, path: str) -> None:
    with guarded.client() as client:
        assert client.request(method, path).status_code == 401
    with client_with(guarded, "alpha") as client:
        assert client.request(method, path).status_code in (200, 404, 405)


def test_orchestrators_need_no_key(guarded: LiveServer) -> None:
    with guarded.client() as client:
        for path in ("/health", "/health/live", "/health/ready"):
            assert client.get(path).status_code == 200


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


def settings_with(
    tiny_checkpoint: Path, tmp_path: Path, keys: dict[str, Limits], **changes: object
) -> tuple[Settings, dict[str, str]]:
    """Settings with a key file, and the secrets by name."""
    file = tmp_path / "keys.json"
    secrets = {name: add_key(file, name, limits)[1] for name, limits in keys.items()}
    return tiny_settings(tiny_checkpoint, tmp_path, key_file=file, **changes), secrets


def status(server: LiveServer, key: str, path: str = "/v1/sessions") -> int:
    with client_with(server, key) as client:
        return client.get(path).status_code


def test_keys_of_file_and_settings_work_together_until_revoked(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings, secrets = settings_with(
        tiny_checkpoint, tmp_path, {"a": Limits(), "b": Limits()}, api_key=("alpha",)
    )
    file = tmp_path / "keys.json"
    with live_server(settings) as server:
        with client_with(server, secrets["a"]) as client:
            session_id = client.post("/v1/sessions").json()["id"]
        assert [status(server, key) for key in (*secrets.values(), "alpha")] == [200] * 3
        assert status(server, "gamma") == 401
        revoke_key(file, "a")
        wait_until(lambda: status(server, secrets["a"]) == 401)
        _, late = add_key(file, "late", Limits())
        wait_until(lambda: status(server, late) == 200)
        assert [status(server, key) for key in (secrets["b"], "alpha")] == [200] * 2
        assert status(server, secrets["b"], f"/v1/sessions/{session_id}") == 404


def test_a_keys_sessions_stay_with_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings, secrets = settings_with(tiny_checkpoint, tmp_path, {"a": Limits()})
    with live_server(settings) as server, client_with(server, secrets["a"]) as client:
        session_id = client.post("/v1/sessions").json()["id"]
    add_key(tmp_path / "keys.json", "b", Limits())
    by_flag = tiny_settings(tiny_checkpoint, tmp_path, api_key=(secrets["a"],))
    for again in (settings, by_flag):
        with live_server(again) as server:
            assert status(server, secrets["a"], f"/v1/sessions/{session_id}") == 200


def test_a_file_that_became_malformed_leaves_the_keys(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, secrets = settings_with(tiny_checkpoint, tmp_path, {"a": Limits()})
    file = tmp_path / "keys.json"
    good = file.read_bytes()
    ring = KeyRing(settings)
    header = f"Bearer {secrets['a']}"
    for spoil in (lambda: file.write_text('{"keys": 1}'), file.unlink):
        spoil()
        for _ in range(3):
            ring.refresh()
        assert ring.find(header).name == "a"
        [record] = caplog.records
        assert record.levelname == "ERROR"
        assert str(file) in record.message
        caplog.clear()
    write_file(file, good)
    revoke_key(file, "a")
    ring.refresh()
    with pytest.raises(Unauthorized):  # also without any key left
        ring.find(header)
    with pytest.raises(Unauthorized):
        ring.find("")


def test_a_key_has_its_own_limits_or_those_of_the_settings(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings, secrets = settings_with(
        tiny_checkpoint,
        tmp_path,
        {"a": Limits(requests_per_minute=5), "b": Limits()},
        api_key=("alpha",),
        key_requests_per_minute=2,
        key_concurrent_requests=3,
    )
    ring = KeyRing(settings)
    found = {name: ring.find(f"Bearer {secret}") for name, secret in secrets.items()}
    assert found["a"].limits == Limits(requests_per_minute=5, concurrent_requests=3)
    assert found["b"].limits == Limits(requests_per_minute=2, concurrent_requests=3)
    assert ring.find("bearer  alpha ").limits == found["b"].limits
    assert len({caller.owner for caller in found.values()}) == 2


def test_a_file_without_keys_guards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings, _ = settings_with(tiny_checkpoint, tmp_path, {"a": Limits()})
    revoke_key(tmp_path / "keys.json", "a")
    with live_server(settings) as server, server.client() as client:
        assert client.get("/v1/models").status_code == 401


def test_metrics_may_be_open(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, api_key=("alpha",), protect_metrics=False)
    with live_server(settings) as server, server.client() as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/docs").status_code == 401


def test_without_keys_everything_is_open(client: httpx.Client) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics", "/v1/sessions", "/v1/models"):
        assert client.get(path).status_code == 200
        assert client.get(path, headers={"Authorization": "Bearer any"}).status_code == 200


def test_what_runs_for_a_revoked_key_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, secret = add_key(file, "app", Limits())
    _, other = add_key(file, "other", Limits())
    settings = tiny_settings(tiny_checkpoint, tmp_path / "data", key_file=file)
    endless = {"prompt": [1], "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    with live_server(settings) as server, client_with(server, secret) as client:
        session_id = client.post("/v1/sessions").json()["id"]
        body = endless | {"session_id": session_id, "resumable": True}
        with (
            client.stream("POST", "/v1/completions", json=endless) as running,
            client.stream("POST", "/v1/completions", json=body) as resumable,
            client_with(server, other) as neighbour,
            neighbour.stream("POST", "/v1/completions", json=endless) as goes_on,
        ):
            revoke_key(file, "app")
            for stream in (running, resumable):
                *_, error, done = (line for line in stream.iter_lines() if line.startswith("data:"))
                assert "was revoked" in error
                assert done == "data: [DONE]"
            server.wait_until_running(1)
            lines = goes_on.iter_lines()
            assert all(next(lines) is not None for _ in range(10))
        entry = [*server.service.open_turns._turns]
        assert len(entry) <= 1


def test_a_key_leaves_connections_to_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_checkpoint, tmp_path, api_key=("alpha", "beta"), max_connections=6
    )
    endless = {"prompt": [1], "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    with live_server(settings) as server, ExitStack() as stack:
        many = stack.enter_context(client_with(server, "alpha"))
        for _ in range(3):
            asked = many.stream("POST", "/v1/completions", json=endless)
            assert stack.enter_context(asked).status_code == 200
        refused = many.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"]["code"] == "too_many_requests"
        other = stack.enter_context(client_with(server, "beta"))
        complete(other)
