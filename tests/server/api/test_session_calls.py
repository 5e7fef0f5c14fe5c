"""Every call on sessions over HTTP: checkpoints, forks, transport, conditions and lifetimes."""

import json
import time
from typing import Any

import httpx
import pytest

from server.api.schemas.sessions import Session
from server.sessions.codec import read
from tests.server.api.calls import BODY, complete, stream, streamed_text, text_of
from tests.server.api.test_sessions import ENDLESS, get, wait_until_free
from tests.server.live import LiveServer


def new(client: httpx.Client, **body: object) -> str:
    response = client.post("/v1/sessions", json=body)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def post(client: httpx.Client, session_id: str, call: str, **body: object) -> dict[str, Any]:
    response = client.post(f"/v1/sessions/{session_id}/{call}", json=body)
    assert response.is_success, response.text
    Session.model_validate_json(response.text)
    return dict(response.json())


def error(response: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, param and code of an error."""
    problem = response.json()["error"]
    return response.status_code, problem["param"], problem["code"]


def export(client: httpx.Client, session_id: str, **params: int) -> bytes:
    response = client.get(f"/v1/sessions/{session_id}/state", params=params)
    assert response.status_code == 200, response.text
    return response.content


def content(client: httpx.Client, session_id: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """Content of an exported blob; the library writes its header in any order."""
    facts, arrays = read(export(client, session_id))
    return facts, {name: values.tobytes() for name, values in arrays.items()}


def data_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, but the last."""
    lines = response.text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def with_turns(client: httpx.Client, count: int) -> tuple[str, list[str]]:
    """A session after some turns, and their texts."""
    session_id = new(client)
    return session_id, [
        text_of(client, prompt=f"turn {turn}", max_tokens=5, session_id=session_id)
        for turn in range(1, count + 1)
    ]


def test_a_session_object_is_complete(client: httpx.Client) -> None:
    before = time.time()
    session_id = new(client, metadata={"k": "v"}, ttl=500)
    complete(client, session_id=session_id)
    session = get(client, session_id)
    Session.model_validate(session)
    assert before <= session["created_at"] < session["last_used_at"] <= time.time()
    assert session["expires_at"] == session["last_used_at"] + 500
    facts = {"ttl": 500, "turn": 1, "checkpoints": 1, "parent": None, "status": "idle"}
    assert session.items() >= facts.items()
    assert get(client, new(client))["expires_at"] is None


@pytest.mark.parametrize("first", ["the cat", [5, 6, 7]])
def test_a_session_can_begin_with_a_text(client: httpx.Client, first: object) -> None:
    response = client.post("/v1/sessions", json={"prompt": first, "metadata": {"k": "v"}})
    session = response.json()
    assert (response.status_code, session["turn"], session["metadata"]) == (201, 1, {"k": "v"})
    assert session == get(client, session["id"]) | {"tier": session["tier"]}
    whole = [*first, 9] if isinstance(first, list) else f"{first} sat"
    rest: object = [9] if isinstance(first, list) else " sat"
    continued = text_of(client, session_id=session["id"], prompt=rest)
    assert continued == text_of(client, prompt=whole)


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [10**6], 5, "x " * 5000])
def test_a_session_that_cannot_begin_is_not_made(client: httpx.Client, prompt: object) -> None:
    before = client.get("/v1/sessions").json()["data"]
    response = client.post("/v1/sessions", json={"prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert client.get("/v1/sessions").json()["data"] == before


def test_turns_are_listed_forked_and_rewound_to(client: httpx.Client) -> None:
    session_id, texts = with_turns(client, 10)
    turns = client.get(f"/v1/sessions/{session_id}/turns").json()
    assert turns["object"] == "list"
    assert [turn["turn"] for turn in turns["data"]] == list(range(10, 2, -1))
    assert turns["data"][0]["tokens"] == get(client, session_id)["tokens"]
    assert all(turn["bytes"] > get(client, session_id)["state_bytes"] for turn in turns["data"])
    for turn in (3, 9):
        fork = post(client, session_id, "fork", turn=turn)
        assert fork["parent"] == {"session_id": session_id, "turn": turn}
        assert (fork["turn"], fork["checkpoints"]) == (turn, 1)
        again = text_of(client, prompt=f"turn {turn + 1}", max_tokens=5, session_id=fork["id"])
        assert again == texts[turn]
    assert get(client, session_id)["turn"] == 10
    rewound = post(client, session_id, "rewind", turn=4)
    assert (rewound["turn"], rewound["checkpoints"], rewound["tier"]) == (4, 2, "store")
    assert text_of(client, prompt="turn 5", max_tokens=5, session_id=session_id) == texts[4]
    assert post(client, session_id, "rewind", turn=0)["tokens"] == 0
    assert text_of(client, prompt="turn 1", max_tokens=5, session_id=session_id) == texts[0]


def test_a_fork_of_now_continues_like_the_original(client: httpx.Client) -> None:
    session_id, _ = with_turns(client, 2)
    fork = client.post(f"/v1/sessions/{session_id}/fork").json()
    assert fork["turn"] == 2
    assert text_of(client, session_id=fork["id"]) == text_of(client, session_id=session_id)
    assert content(client, fork["id"]) == content(client, session_id)


def test_a_busy_session_can_be_forked_and_exported(
    server: LiveServer, client: httpx.Client
) -> None:
    session_id, _ = with_turns(client, 1)
    before = export(client, session_id)
    turn = ENDLESS | {"session_id": session_id, "stream": True}
    with server.client() as other, other.stream("POST", "/v1/completions", json=turn) as running:
        lines = running.iter_lines()
        next(lines)
        assert get(client, session_id)["tier"] == "device"
        fork = post(client, session_id, "fork")
        assert export(client, fork["id"]) == export(client, session_id) == before
        response = client.post(f"/v1/sessions/{session_id}/rewind", json={"turn": 0})
        assert error(response) == (409, "session_id", "session_busy")
        assert response.headers["x-should-retry"] == "false"
    wait_until_free(client, session_id)
    assert export(client, session_id) == before


@pytest.mark.parametrize(
    ("method", "call", "body", "expected"),
    [
        ("POST", "fork", {"turn": 7}, (404, "turn", "turn_not_found")),
        ("POST", "rewind", {"turn": 7}, (404, "turn", "turn_not_found")),
        ("GET", "state?turn=7", None, (404, "turn", "turn_not_found")),
        ("GET", "state?turn=0", None, (404, "turn", "turn_not_found")),
        ("GET", "state?turn=x", None, (400, "turn", "invalid_value")),
        ("POST", "rewind", {}, (400, "turn", "missing_required_parameter")),
        ("POST", "rewind", None, (400, None, "missing_required_parameter")),
        ("POST", "rewind", {"turn": -1}, (400, "turn", "invalid_value")),
        ("POST", "rewind", {"turn": 10**30}, (400, "turn", "invalid_value")),
        ("POST", "fork", {"turn": "1"}, (400, "turn", "invalid_value")),
        ("POST", "fork", {"ttl": 0}, (400, "ttl", "invalid_value")),
        ("POST", "fork", {"trun": 1}, (400, "trun", "unknown_parameter")),
        ("GET", "fork", None, (405, None, "method_not_allowed")),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx.Client,
    method: str,
    call: str,
    body: object,
    expected: tuple[int, str | None, str],
) -> None:
    session_id, _ = with_turns(client, 1)
    before = get(client, session_id)
    response = client.request(method, f"/v1/sessions/{session_id}/{call}", json=body)
    assert error(response) == expected
    assert get(client, session_id) | {"tier": "device"} == before


@pytest.mark.parametrize("call", ["", "/turns", "/fork", "/rewind", "/state"])
def test_an_unknown_session_is_not_found(client: httpx.Client, call: str) -> None:
    method = "POST" if call in ("/fork", "/rewind") else "GET"
    response = client.request(method, f"/v1/sessions/sess_nobody{call}", json={"turn": 1})
    assert error(response) == (404, "session_id", "session_not_found")


def test_a_session_moves_as_a_blob(client: httpx.Client) -> None:
    session_id, _ = with_turns(client, 3)
    response = client.get(f"/v1/sessions/{session_id}/state")
    assert response.headers["content-type"] == "application/octet-stream"
    assert f'filename="{session_id}-3.safetensors"' in response.headers["content-disposition"]
    assert response.headers["X-Session-Turn"] == "3"
    moved = client.post(
        "/v1/sessions/import",
        content=response.content,
        params={"ttl": 100, "metadata": json.dumps({"k": "v"})},
    )
    assert moved.status_code == 201
    session = moved.json()
    assert (session["turn"], session["ttl"], session["metadata"]) == (3, 100, {"k": "v"})
    assert session["arithmetic"] == session["arithmetic_before"] == "float32 x float32"
    assert session["tokens"] == get(client, session_id)["tokens"]
    earlier = client.post("/v1/sessions/import", content=export(client, session_id, turn=2)).json()
    assert earlier["turn"] == 2
    for each in (session, earlier):
        assert each["id"] != session_id
    assert text_of(client, session_id=session["id"]) == text_of(client, session_id=session_id)


def test_a_blob_may_exceed_the_limit_of_other_bodies(
    client: httpx.Client, server: LiveServer
) -> None:
    most = server.service.settings.max_body_bytes
    assert error(client.post("/v1/completions", content=b"x" * (most + 1)))[0] == 413
    fits = client.post("/v1/sessions/import", content=b"x" * (most + 1))
    assert (most < 150_000, error(fits)[0]) == (True, 413)  # a tiny model's blobs are small


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda blob: blob[:-1], "not a complete safetensors blob"),
        (lambda blob: blob[:0], "not a complete safetensors blob"),
        (lambda blob: bytes(len(blob)), "not a complete safetensors blob"),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum"),
        (lambda blob: blob.replace(b'"fingerprint":"', b'"fingerprint":"0', 1), "complete"),
        (lambda blob: blob.replace(b'"version":"5"', b'"version":"3"', 1), "version is '3'"),
    ],
)
def test_a_blob_that_does_not_fit_is_refused(client: httpx.Client, damage: Any, named: str) -> None:
    session_id, _ = with_turns(client, 1)
    count = len(client.get("/v1/sessions?limit=100").json()["data"])
    response = client.post("/v1/sessions/import", content=damage(export(client, session_id)))
    assert error(response) == (422, None, "unfit_state")
    assert named in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert len(client.get("/v1/sessions?limit=100").json()["data"]) == count


@pytest.mark.parametrize("metadata", ["{", "[]", '{"k": 1}', '"x"', '{"": "v"}', "null"])
def test_metadata_of_an_import_are_checked(client: httpx.Client, metadata: str) -> None:
    response = client.post("/v1/sessions/import", params={"metadata": metadata}, content=b"")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")


def test_a_turn_can_expect_the_one_before(client: httpx.Client, session_id: str) -> None:
    answer = complete(client, session_id=session_id, expected_turn=0)
    assert answer["session_turn"] == 1
    before = get(client, session_id)
    for expected in (0, 2):
        response = client.post(
            "/v1/completions", json=BODY | {"session_id": session_id, "expected_turn": expected}
        )
        assert error(response) == (409, "expected_turn", "turn_mismatch")
        assert response.headers["x-should-retry"] == "false"
    assert get(client, session_id) == before
    events = stream(client, session_id=session_id, expected_turn=1)
    turns = [event.get("session_turn") for event in events[:-1]]
    assert (turns[-1], set(turns[:-1])) == (2, {None})
    response = client.post("/v1/completions", json=BODY | {"expected_turn": 0})
    assert error(response)[:2] == (400, "expected_turn")


KEY = {"Idempotency-Key": "5f0c-1"}


def test_a_turn_with_a_key_is_run_once(client: httpx.Client, session_id: str) -> None:
    asked = BODY | {"session_id": session_id, "echo": True}
    first = client.post("/v1/completions", json=asked, headers=KEY)
    assert "Idempotent-Replayed" not in first.headers
    after = get(client, session_id)
    again = client.post("/v1/completions", json=asked, headers=KEY)
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["X-Session-ID"] == session_id
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/completions", json=asked | options, headers=KEY)
    events = data_of(response)
    assert [c["text"] for e in events for c in e["choices"]] == [first.json()["choices"][0]["text"]]
    assert events[0]["choices"][0]["finish_reason"] == "length"
    assert [e["usage"] for e in events] == [None, first.json()["usage"]]
    assert get(client, session_id) == after
    other = client.post("/v1/completions", json=asked | {"max_tokens": 3}, headers=KEY)
    assert error(other) == (409, "Idempotency-Key", "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    new_key = {"Idempotency-Key": "5f0c-2"}
    assert client.post("/v1/completions", json=asked, headers=new_key).json() != first.json()
    assert get(client, session_id)["turn"] == 2


def test_a_streamed_turn_is_replayed_unchanged(client: httpx.Client, session_id: str) -> None:
    asked = BODY | {"session_id": session_id, "stream": True}
    response = client.post("/v1/completions", json=asked, headers=KEY)
    texts = data_of(response)
    again = client.post("/v1/completions", json=asked | {"stream": False}, headers=KEY).json()
    assert again["id"] == texts[0]["id"]
    assert again["choices"][0]["text"] == "".join(t["choices"][0]["text"] for t in texts)
    assert (again["session_turn"], again["usage"]["completion_tokens"]) == (1, 24)


def test_a_rolled_back_turn_can_be_run_with_its_key(
    server: LiveServer, client: httpx.Client, session_id: str
) -> None:
    asked = ENDLESS | {"session_id": session_id, "stream": True}
    with (
        server.client() as other,
        other.stream("POST", "/v1/completions", json=asked, headers=KEY) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        response = client.post("/v1/completions", json=asked, headers=KEY)
        assert error(response) == (409, "session_id", "session_busy")
    wait_until_free(client, session_id)
    response = client.post(
        "/v1/completions", json=asked | {"stream": False, "max_tokens": 4}, headers=KEY
    )
    assert response.json()["session_turn"] == 1


@pytest.mark.parametrize("key", ["", "é", "x" * 256])
def test_a_key_that_cannot_be_is_refused(client: httpx.Client, session_id: str, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode())]
    response = client.post(
        "/v1/completions", json=BODY | {"session_id": session_id}, headers=headers
    )
    assert response.status_code == 400
    assert "idempotency" in str(response.json()["error"]["param"]).lower()


def test_without_a_session_a_key_changes_nothing(client: httpx.Client) -> None:
    answers = [client.post("/v1/completions", json=BODY, headers=KEY).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["session_turn"] is None
    different = client.post("/v1/completions", json=BODY | {"max_tokens": 2}, headers=KEY)
    assert different.status_code == 200


def test_pages_go_through_all(client: httpx.Client) -> None:
    made = [new(client) for _ in range(7)]
    seen, after = list[str](), dict[str, str]()
    for _ in range(3):
        page = client.get("/v1/sessions", params={"limit": "3"} | after).json()
        seen += [session["id"] for session in page["data"]]
        after = {"after": page["last_id"]}
    assert seen[:7] == made[::-1]
    response = client.get("/v1/sessions", params={"after": "sess_nobody"})
    assert error(response)[:2] == (400, "after")


def test_streamed_and_whole_turns_are_one_conversation(client: httpx.Client) -> None:
    a, b = new(client), new(client)
    text = text_of(client, session_id=a) + text_of(client, session_id=a, prompt="more")
    streamed = streamed_text(stream(client, session_id=b))
    streamed += streamed_text(stream(client, session_id=b, prompt="more"))
    assert streamed == text
    assert content(client, a) == content(client, b)
