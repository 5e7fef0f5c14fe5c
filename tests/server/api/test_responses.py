"""`/v1/responses` through a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.schemas.responses import ResponseEvent, ResponseObject
from tests.patience import wait_until
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

URL = "/v1/responses"
BODY: dict[str, Any] = {
    "input": "the cat",
    "max_output_tokens": 12,
    "seed": 3,
    "ignore_eos": True,
}
LONG = {"max_output_tokens": 60_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = tiny_settings(
        folder,
        tmp_path_factory.mktemp("data"),
        api_key=("alpha", "beta"),
        stream_keepalive_s=0.2,
        max_resumable_streams=4,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        client.headers["Authorization"] = "Bearer alpha"
        yield client


def respond(client: httpx.Client, **changes: object) -> dict[str, Any]:
    response = client.post(URL, json=BODY | changes)
    assert response.status_code == 200, response.text
    ResponseObject.model_validate_json(response.text, extra="forbid")
    return dict(response.json())


def stream(client: httpx.Client, **changes: object) -> list[dict[str, Any]]:
    response = client.post(URL, json=BODY | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    return events_of(response.text, has_ids=False)


def events_of(text: str, *, has_ids: bool) -> list[dict[str, Any]]:
    """Events, each checked against the documented schema and its own name and number.

    A comment is a separate block if events have no ids, otherwise a line of the next event.
    """
    events = []
    comment = ": keep-alive\n" if has_ids else ": keep-alive\n\n"
    for block in text.replace(comment, "").removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        event = ResponseEvent.model_validate_json(fields["data"], extra="forbid")
        number = {"id": str(event.sequence_number)} if has_ids else {}
        assert fields == {"event": event.type, "data": fields["data"]} | number
        events.append(json.loads(fields["data"]))
    return events


def follow(client: httpx.Client, response_id: str) -> list[dict[str, Any]]:
    """The events of a background response, from the first to the last."""
    response = client.get(f"{URL}/{response_id}", params={"stream": True})
    assert response.status_code == 200, response.text
    return events_of(response.text, has_ids=True)


def text(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["text"])


def wait_for(client: httpx.Client, response_id: str, *statuses: str) -> dict[str, Any]:
    def found() -> dict[str, Any]:
        return dict(client.get(f"{URL}/{response_id}").json())

    wait_until(lambda: found()["status"] in statuses)
    return found()


def test_a_response_has_openais_shape_and_can_be_retrieved(client: httpx.Client) -> None:
    made = respond(client, metadata={"a": "b"}, instructions="be kind")
    assert made["id"].startswith("resp_")
    assert (made["status"], made["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    [message] = made["output"]
    assert (message["type"], message["role"], message["status"]) == (
        "message",
        "assistant",
        "incomplete",
    )
    assert message["content"][0]["annotations"] == []
    assert made["usage"]["output_tokens"] == 12
    assert made["metadata"] == {"a": "b"}
    assert made["completed_at"] >= made["created_at"]
    assert client.get(f"{URL}/{made['id']}").json() == made


def test_going_on_is_the_conversation_sent_whole(client: httpx.Client) -> None:
    first = respond(client)
    second = respond(client, input="and then", previous_response_id=first["id"])
    third = respond(client, input="sat", previous_response_id=second["id"])
    assert third["previous_response_id"] == second["id"]
    past = second["usage"]["total_tokens"]
    assert third["usage"]["input_tokens_details"]["cached_tokens"] == past
    session_id = client.post("/v1/sessions").json()["id"]
    for asked, made in (("the cat", first), ("and then", second), ("sat", third)):
        chat = {
            "messages": [{"role": "user", "content": asked}],
            "max_tokens": 12,
            "seed": 3,
            "ignore_eos": True,
            "session_id": session_id,
        }
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == text(made)


def test_any_earlier_response_can_be_continued_any_number_of_times(
    client: httpx.Client,
) -> None:
    first = respond(client)
    then = [respond(client, input="a", previous_response_id=first["id"]) for _ in range(2)]
    respond(client, input="b", previous_response_id=then[0]["id"])
    again = respond(client, input="a", previous_response_id=first["id"])
    assert text(again) == text(then[0]) == text(then[1])


def test_messages_of_parts_and_output_items_are_input(client: httpx.Client) -> None:
    first = respond(client, store=False)
    parts = [{"type": "input_text", "text": "the "}, {"type": "input_text", "text": "cat"}]
    history: list[object] = [{"role": "user", "content": parts}]
    assert text(respond(client, input=history)) == text(first)
    whole = [*history, *first["output"], {"role": "user", "content": "sat"}]
    respond(client, input=whole)


def test_what_is_not_stored_is_not_there(client: httpx.Client) -> None:
    kept = respond(client)
    made = respond(client, store=False, previous_response_id=kept["id"], input="x")
    assert text(made) == text(respond(client, previous_response_id=kept["id"], input="x"))
    assert client.get(f"{URL}/{made['id']}").status_code == 404
    response = client.post(URL, json=BODY | {"previous_response_id": made["id"]})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "response_not_found",
        "previous_response_id",
    )


def test_a_stream_has_the_same_content_in_typed_events(client: httpx.Client) -> None:
    events = stream(client)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event.get("delta", "") for event in events)
    assert deltas == events[-4]["text"] == text(respond(client))
    last = events[-1]["response"]
    assert client.get(f"{URL}/{last['id']}").json() == last
    assert last["output"][0]["id"] == events[4]["item_id"]


def test_in_the_background_it_continues_alone(client: httpx.Client) -> None:
    made = respond(client, background=True)
    assert (made["status"], made["output"]) == ("in_progress", [])
    found = wait_for(client, made["id"], "incomplete")
    assert text(found) == text(respond(client))
    response = client.get(f"{URL}/{made['id']}", params={"stream": True, "starting_after": 4})
    assert events_of(response.text, has_ids=True)[0]["sequence_number"] == 5
    respond(client, previous_response_id=made["id"])


def test_a_stream_in_the_background_survives_its_connection(client: httpx.Client) -> None:
    body = BODY | {"stream": True, "background": True}
    with client.stream("POST", URL, json=body) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
    response_id = json.loads(first[6:])["response"]["id"]
    response = client.get(f"{URL}/{response_id}", params={"stream": True, "starting_after": 0})
    events = events_of(response.text, has_ids=True)
    assert events[0]["sequence_number"] == 1
    assert events[-1]["response"] == wait_for(client, response_id, "incomplete")


def test_cancelling(client: httpx.Client, server: LiveServer) -> None:
    made = respond(client, background=True, **LONG)
    response = client.post(f"{URL}/{made['id']}/cancel")
    assert (response.json()["status"], response.json()["error"]) == ("cancelled", None)
    server.wait_until_idle()
    assert client.get(f"{URL}/{made['id']}").json() == response.json()
    refused = client.post(URL, json=BODY | {"previous_response_id": made["id"]})
    assert refused.json()["error"]["code"] == "response_unusable"
    done = respond(client, background=True)
    ended = wait_for(client, done["id"], "incomplete")
    assert client.post(f"{URL}/{done['id']}/cancel").json() == ended
    plain = respond(client)
    refused = client.post(f"{URL}/{plain['id']}/cancel")
    assert refused.json()["error"]["code"] == "response_not_in_background"


def test_deleting_while_it_is_made(client: httpx.Client, server: LiveServer) -> None:
    made = respond(client, background=True, **LONG)
    assert client.delete(f"{URL}/{made['id']}").json()["deleted"] is True
    server.wait_until_idle()
    assert client.get(f"{URL}/{made['id']}").status_code == 404
    assert client.delete(f"{URL}/{made['id']}").status_code == 404


def test_a_deadline_in_the_background_is_reported(client: httpx.Client) -> None:
    made = respond(client, background=True, timeout=0.05, **LONG)
    found = wait_for(client, made["id"], "failed")
    assert found["error"]["code"] == "deadline_exceeded"
    events = follow(client, made["id"])
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == found["error"]


def test_a_lost_connection_stores_nothing(client: httpx.Client, server: LiveServer) -> None:
    with client.stream("POST", URL, json=BODY | {"stream": True} | LONG) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
    server.wait_until_idle()
    response_id = json.loads(first[6:])["response"]["id"]
    assert client.get(f"{URL}/{response_id}").status_code == 404


def test_responses_are_their_owners(client: httpx.Client, server: LiveServer) -> None:
    made = respond(client, background=True)
    wait_for(client, made["id"], "incomplete")
    with server.client() as other:
        other.headers["Authorization"] = "Bearer beta"
        answers = [
            other.get(f"{URL}/{made['id']}"),
            other.get(f"{URL}/{made['id']}", params={"stream": True}),
            other.post(f"{URL}/{made['id']}/cancel"),
            other.delete(f"{URL}/{made['id']}"),
            other.post(URL, json=BODY | {"previous_response_id": made["id"]}),
        ]
    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["error"]["code"] for answer in answers} == {"response_not_found"}


def test_a_session_can_begin_with_a_response(client: httpx.Client) -> None:
    made = respond(client)
    session = client.post("/v1/sessions", json={"response_id": made["id"]}).json()
    assert (session["turn"], session["tokens"]) == (1, made["usage"]["total_tokens"])
    chat = {
        "messages": [{"role": "user", "content": "sat"}],
        "max_tokens": 12,
        "seed": 3,
        "ignore_eos": True,
        "session_id": session["id"],
    }
    answer = client.post("/v1/chat/completions", json=chat).json()
    then = respond(client, input="sat", previous_response_id=made["id"])
    assert answer["choices"][0]["message"]["content"] == text(then)


def test_responses_survive_a_restart(folder: Path, tmp_path: Path) -> None:
    settings = tiny_settings(folder, tmp_path)
    with live_server(settings) as running, running.client() as client:
        first = respond(client)
        then = respond(client, input="x", previous_response_id=first["id"])
    with live_server(settings) as running, running.client() as client:
        assert client.get(f"{URL}/{first['id']}").json() == first
        again = respond(client, input="x", previous_response_id=first["id"])
        assert text(again) == text(then)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"max_output_tokens": 70_000}, "max_output_tokens", "invalid_value"),
        ({"input": 5}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "invalid_value",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True, "store": False}, "store", "invalid_value"),
        ({"ttl": 5, "store": False}, "ttl", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "response_not_found"),
        ({"n": 2}, "n", "unknown_parameter"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx.Client, changes: dict[str, object], param: str, code: str
) -> None:
    response = client.post(URL, json=BODY | changes)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("params", "param"),
    [({"starting_after": 3}, "starting_after"), ({"stream": True}, "stream")],
)
def test_only_what_is_in_the_background_can_be_followed(
    client: httpx.Client, params: dict[str, Any], param: str
) -> None:
    made = respond(client)
    response = client.get(f"{URL}/{made['id']}", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_response_continues_after_the_last_event_id(client: httpx.Client) -> None:
    """Rather than after `starting_after`, which is still in the URL when a client reconnects."""
    asked = {"input": "the cat", "max_output_tokens": 4, "background": True}
    made = client.post(URL, json=asked).json()
    url = f"{URL}/{made['id']}?stream=true"

    def numbers(url: str, last: object) -> list[int]:
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        response = client.get(url, headers=headers)
        assert response.status_code in (200, 204), response.text
        lines = response.text.splitlines()
        return [int(line[4:]) for line in lines if line.startswith("id: ")]

    every = numbers(url, None)
    assert every == list(range(len(every)))
    assert numbers(url, 2) == numbers(f"{url}&starting_after=0", 2) == every[3:]
    assert numbers(f"{url}&starting_after=2", None) == every[3:]
    assert client.get(url, headers={"Last-Event-ID": str(every[-1])}).status_code == 204
    assert client.get(f"{url}&starting_after={every[-1]}").status_code == 204
    refused = client.get(url, headers={"Last-Event-ID": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Last-Event-ID")
    refused = client.get(f"{url}&include_obfuscation=true")
    assert refused.json()["error"]["code"] == "unsupported_parameter"
