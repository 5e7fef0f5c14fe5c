"""`/v1/chat/completions` through a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.schemas.chat import ChatChunk, ChatCompletion
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 12,
    "seed": 3,
    "ignore_eos": True,
}
URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    with live_server(tiny_settings(folder, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def chat(client: httpx.Client, **changes: object) -> dict[str, Any]:
    response = client.post(URL, json=BODY | changes)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.text, extra="forbid")
    return dict(response.json())


def stream(client: httpx.Client, **changes: object) -> list[dict[str, Any]]:
    response = client.post(URL, json=BODY | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    for event in data[:-1]:
        ChatChunk.model_validate_json(event, extra="forbid")
    return [json.loads(event) for event in data[:-1]]


def content(answer: dict[str, Any], index: int = 0) -> str:
    return str(answer["choices"][index]["message"]["content"])


def test_an_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = chat(client)
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {
        "role": "assistant",
        "content": content(answer),
        "refusal": None,
        "annotations": [],
    }
    assert answer["usage"]["completion_tokens"] == 12
    # <|endoftext|><|user|>the cat<|end|><|assistant|>
    ids = chat(client, return_token_ids=True)["prompt_token_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert (ids[:2], ids[-2:]) == ([0, 2], [4, 3])


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    events = stream(client, n=2, stream_options={"include_usage": True})
    whole = chat(client, n=2)
    for index in (0, 1):
        own = [c for e in events for c in e["choices"] if c["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == content(whole, index)
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        assert own[-1]["delta"] == {}
    assert content(whole, 0) != content(whole, 1)
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
    assert {event["usage"] for event in events[:-1]} == {None}
    assert len({event["id"] for event in events}) == 1


def test_a_session_continues_as_if_all_had_been_sent(client: httpx.Client) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    past = list[int]()
    for turn, text in enumerate(["the cat", "and then", "on the mat"], 1):
        answer = chat(
            client,
            session_id=session_id,
            messages=[{"role": "user", "content": text}],
            return_token_ids=True,
        )
        assert answer["session_turn"] == turn
        past += answer["prompt_token_ids"]
        assert answer["usage"]["prompt_tokens"] == len(past)
        asked = {"prompt": past, "max_tokens": 12, "seed": 3, "ignore_eos": True}
        alone = client.post("/v1/completions", json=asked).json()
        assert alone["choices"][0]["text"] == content(answer)
        past += answer["choices"][0]["token_ids"]
        assert client.get(f"/v1/sessions/{session_id}").json()["tokens"] == len(past)


def test_no_messages_continue_the_last_answer(client: httpx.Client) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    parts = [
        content(chat(client, **changes | {"session_id": session_id, "max_tokens": count}))
        for count, changes in [(5, BODY), (7, {"messages": []})]
    ]
    assert "".join(parts) == content(chat(client))


def test_an_answer_that_has_ended_can_be_continued(client: httpx.Client) -> None:
    """After an end of text, and after a stop string."""
    whole = content(chat(client))
    for changes in ({"ignore_eos": False, "logit_bias": {"0": 100}}, {"stop": whole[0]}):
        session_id = client.post("/v1/sessions").json()["id"]
        first = chat(client, session_id=session_id, **changes)
        assert (content(first), first["choices"][0]["finish_reason"]) == ("", "stop")
        assert content(chat(client, session_id=session_id, messages=[])) == whole


def test_a_turn_with_a_key_is_run_once(client: httpx.Client) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    headers = {"Idempotency-Key": "one"}
    asked = BODY | {"session_id": session_id}
    first = client.post(URL, json=asked, headers=headers)
    again = client.post(URL, json=asked, headers=headers)
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (first.json(), "true")
    events = stream(client)  # of another answer, to compare shapes with
    replayed = client.post(
        URL,
        json=asked | {"stream": True, "stream_options": {"include_usage": True}},
        headers=headers,
    )
    data = [line[6:] for line in replayed.text.splitlines() if line.startswith("data: ")]
    reported = [ChatChunk.model_validate_json(event) for event in data[:-1]]
    assert "".join(c.delta.content or "" for e in reported for c in e.choices) == content(
        first.json()
    )
    assert reported[-1].usage is not None
    assert reported[0].object == events[0]["object"]
    assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 1


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_completion_tokens": 70_000}, "max_completion_tokens", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx.Client, changes: dict[str, object], param: str, code: str
) -> None:
    response = client.post(URL, json=BODY | changes)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_parameters_without_effect_are_accepted(client: httpx.Client) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "auto",
        "functions": None,
        "store": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "reasoning_effort": None,
        "service_tier": "auto",
        "metadata": {"a": "b"},
        "logprobs": None,
        "stop": None,
        "user": "me",
    }
    assert content(chat(client, **harmless)) == content(chat(client))


def test_a_model_without_a_template_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path)
    with live_server(settings) as running, running.client() as client:
        response = client.post(URL, json=BODY)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
