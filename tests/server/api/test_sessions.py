"""Sessions over HTTP: turns are atomic, exact, and one at a time."""

import threading
from contextlib import closing
from typing import Any

import httpx
import pytest

from server.engine.sizes import RUNNING, WARM
from tests.patience import wait_until
from tests.server.api.calls import BODY, complete, send, stream, streamed_text, text_of
from tests.server.live import LiveServer

ENDLESS: dict[str, Any] = BODY | {"max_tokens": 50_000}


def get(client: httpx.Client, session_id: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/sessions/{session_id}").json())


def test_a_new_session_is_empty(client: httpx.Client, server: LiveServer) -> None:
    created = client.post("/v1/sessions", json={"metadata": {"topic": "cats"}})
    assert created.status_code == 201
    session = created.json()
    assert session == get(client, session["id"])
    assert len(session["id"]) > 30
    spec = server.service.checkpoint.network.state_spec
    expected = {"turn": 0, "tokens": 0, "tier": None, "status": "idle"}
    assert session.items() >= (expected | {"state_bytes": spec.num_bytes}).items()
    assert session["metadata"] == {"topic": "cats"}


@pytest.mark.parametrize("metadata", [{"a": 1}, {"": "x"}, {"k" * 65: "v"}, {"k": "v" * 513}, "x"])
def test_wrong_metadata_is_refused(client: httpx.Client, metadata: object) -> None:
    response = client.post("/v1/sessions", json={"metadata": metadata})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("metadata")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_continue_exactly_as_one(
    client: httpx.Client, session_id: str, temperature: float
) -> None:
    whole = text_of(client, max_tokens=80, temperature=temperature, frequency_penalty=0.5)
    settings = {"temperature": temperature, "frequency_penalty": 0.5, "session_id": session_id}
    first = text_of(client, max_tokens=40, **settings)
    second = streamed_text(stream(client, prompt="", max_tokens=17, **settings))
    third = text_of(client, prompt=None, max_tokens=23, **settings)
    assert first + second + third == whole
    session = get(client, session_id)
    assert (session["turn"], session["tier"]) == (3, "device")


def test_usage_counts_what_the_session_held(client: httpx.Client, session_id: str) -> None:
    first = complete(client, session_id=session_id)["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    second = complete(client, session_id=session_id, prompt=[5, 6])["usage"]
    held = first["total_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] == held
    assert second["prompt_tokens"] == held + 2
    assert get(client, session_id)["tokens"] == second["total_tokens"]


def test_a_session_is_named_by_header_too(client: httpx.Client, session_id: str) -> None:
    headers = {"X-Session-ID": session_id}
    answer = client.post("/v1/completions", json=BODY, headers=headers)
    assert answer.headers["X-Session-ID"] == session_id
    assert get(client, session_id)["turn"] == 1
    both = client.post("/v1/completions", json=BODY | {"session_id": "other"}, headers=headers)
    assert (both.status_code, both.json()["error"]["param"]) == (400, "session_id")


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"n": 2}, "n"), ({"prompt": ["a", "b"]}, "prompt")],
)
def test_what_a_turn_cannot_be(
    client: httpx.Client, session_id: str, changes: dict[str, Any], param: str
) -> None:
    before = get(client, session_id)
    response = client.post("/v1/completions", json=BODY | {"session_id": session_id} | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert get(client, session_id) == before
    assert text_of(client, session_id=session_id)


def test_a_session_continues_after_every_end(client: httpx.Client, server: LiveServer) -> None:
    """On an empty prompt it continues as without the end."""

    def generate(**changes: Any) -> dict[str, Any]:
        return dict(complete(client, return_token_ids=True, **changes)["choices"][0])

    [name, *_] = server.service.checkpoint.tokenizer.special_tokens
    [end] = server.service.checkpoint.network.eos
    whole = generate()["token_ids"]
    only_end = {"logit_bias": {str(end): 100}}
    ends: dict[str, tuple[dict[str, Any], object]] = {
        "end token": (only_end | {"ignore_eos": False}, None),
        "its name": (only_end | {"stop": [name]}, name),
        "stop token": ({"stop_token_ids": [whole[5]]}, whole[5]),
        "length": ({"max_tokens": 3}, None),
    }
    for title, (changes, reason) in ends.items():
        session_id = client.post("/v1/sessions").json()["id"]
        first = generate(session_id=session_id, **changes)
        expected = "length" if title == "length" else "stop"
        assert (first["finish_reason"], first["stop_reason"]) == (expected, reason)
        count = len(whole) - len(first["token_ids"])
        rest = generate(session_id=session_id, prompt="", max_tokens=count)
        assert first["token_ids"] + rest["token_ids"] == whole, title


def test_a_session_read_without_an_answer(client: httpx.Client, session_id: str) -> None:
    complete(client, session_id=session_id, prompt="the cat", max_tokens=0)
    continued = text_of(client, session_id=session_id, prompt=" sat")
    assert continued == text_of(client, prompt="the cat sat")


def test_a_busy_session_is_a_conflict(
    server: LiveServer, client: httpx.Client, session_id: str
) -> None:
    turn = ENDLESS | {"session_id": session_id, "stream": True}
    with server.client() as other, other.stream("POST", "/v1/completions", json=turn) as running:
        lines = running.iter_lines()
        next(lines)
        second = client.post("/v1/completions", json=BODY | {"session_id": session_id})
        assert (second.status_code, second.json()["error"]["code"]) == (409, "session_busy")
        assert second.headers["x-should-retry"] == "false"
        assert client.delete(f"/v1/sessions/{session_id}").status_code == 409
        assert get(client, session_id)["status"] == "busy"
    wait_until_free(client, session_id)


def test_exactly_one_of_many_racing_turns_wins(server: LiveServer, session_id: str) -> None:
    turn = BODY | {"session_id": session_id, "max_tokens": 300}
    statuses: list[int] = []

    def ask() -> None:
        with server.client() as client:
            statuses.append(client.post("/v1/completions", json=turn).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with server.client() as client:
        won = statuses.count(200)
        assert won + statuses.count(409) == 8
        assert won >= 1
        assert get(client, session_id)["turn"] == won


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_a_disconnected_turn_rolls_back(
    server: LiveServer, client: httpx.Client, session_id: str, streamed: bool, warm: bool
) -> None:
    twin = client.post("/v1/sessions").json()["id"]
    for each in (session_id, twin):
        complete(client, session_id=each)
    if not warm:
        push_out_of_the_device(client)
    before = get(client, session_id)
    turn = ENDLESS | {"session_id": session_id, "stream": streamed}
    if streamed:
        with (
            server.client() as leaving,
            leaving.stream("POST", "/v1/completions", json=turn) as running,
        ):
            next(running.iter_lines())
    else:
        with closing(send(server.url, turn)):
            wait_until(lambda: get(client, session_id)["status"] == "busy")
    wait_until_free(client, session_id)
    server.wait_until_idle()
    after = get(client, session_id)
    assert after | {"tier": "host"} == before | {"tier": "host"}
    again = complete(client, session_id=session_id, prompt=" sat")
    same = complete(client, session_id=twin, prompt=" sat")
    assert again["choices"] == same["choices"]
    assert again["usage"] == same["usage"]


def test_a_warm_row_that_was_given_away_is_loaded_again(
    client: httpx.Client, session_id: str
) -> None:
    whole = text_of(client, max_tokens=40)
    first = text_of(client, max_tokens=20, session_id=session_id)
    assert get(client, session_id)["tier"] == "device"
    push_out_of_the_device(client)
    assert get(client, session_id)["tier"] == "host"
    assert first + text_of(client, prompt="", max_tokens=20, session_id=session_id) == whole


def test_deleted_means_erased(client: httpx.Client, session_id: str) -> None:
    complete(client, session_id=session_id)
    deleted = client.delete(f"/v1/sessions/{session_id}")
    assert deleted.json() == {"id": session_id, "object": "session.deleted", "deleted": True}
    assert client.get(f"/v1/sessions/{session_id}").status_code == 404
    gone = client.post("/v1/completions", json=BODY | {"session_id": session_id})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "session_not_found")


def test_sessions_are_listed_newest_first_in_pages(client: httpx.Client) -> None:
    made = [client.post("/v1/sessions").json()["id"] for _ in range(5)]
    first = client.get("/v1/sessions", params={"limit": 3}).json()
    assert [session["id"] for session in first["data"]] == made[:1:-1]
    assert first["has_more"]
    assert (first["first_id"], first["last_id"]) == (made[4], made[2])
    rest = client.get("/v1/sessions", params={"limit": 2, "after": first["last_id"]}).json()
    assert [session["id"] for session in rest["data"]] == [made[1], made[0]]


def push_out_of_the_device(client: httpx.Client) -> None:
    """Run turns of other sessions until all earlier warm rows are evicted."""
    for _ in range(RUNNING + WARM):
        other = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=other, max_tokens=1)


def wait_until_free(client: httpx.Client, session_id: str) -> None:
    wait_until(lambda: get(client, session_id)["status"] == "idle")
