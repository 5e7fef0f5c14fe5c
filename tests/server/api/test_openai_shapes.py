"""Answers and events have the fields that OpenAI's specification requires.

The official client's types are made from that specification: what they validate has every required
field, each of its type.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.api.chats import make_checkpoint
from tests.server.live import live_server, tiny_settings

COMPLETION = {"prompt": "the cat", "max_tokens": 8, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8, "seed": 1}
RESPONSE = {"input": "the cat", "max_output_tokens": 8, "seed": 1}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USAGE = {"stream_options": {"include_usage": True}}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    settings = tiny_settings(folder, tmp_path_factory.mktemp("data"))
    with live_server(settings) as running, running.client() as client:
        yield client


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.text


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = answer(client, path, body | {"stream": True})
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(event) for event in data if event != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/completions", COMPLETION, Completion),
        ("/v1/completions", COMPLETION | {"logprobs": 2}, Completion),
        ("/v1/completions", COMPLETION | {"n": 2, "best_of": 3}, Completion),
        ("/v1/chat/completions", CHAT, ChatCompletion),
        ("/v1/chat/completions", CHAT | {"n": 2} | LOGPROBS, ChatCompletion),
        ("/v1/responses", RESPONSE, Response),
        (
            "/v1/responses",
            RESPONSE | {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
            Response,
        ),
        ("/v1/responses", RESPONSE | {"background": True}, Response),
    ],
)
def test_answers(
    client: httpx.Client, path: str, body: dict[str, Any], shape: type[BaseModel]
) -> None:
    reported = shape.model_validate_json(answer(client, path, body))
    assert reported.model_fields_set >= {
        name for name, field in shape.model_fields.items() if field.is_required()
    }


def texts(answers: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice."""
    reported = dict[int, str]()
    for choice in (choice for answer in answers for choice in answer["choices"]):
        parts = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        reported[choice["index"]] = reported.get(choice["index"], "") + (parts.get("content") or "")
    return reported


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/completions", COMPLETION | USAGE, Completion),
        ("/v1/completions", COMPLETION | {"logprobs": 2}, Completion),
        ("/v1/chat/completions", CHAT | USAGE, ChatCompletionChunk),
        ("/v1/chat/completions", CHAT | {"n": 2} | LOGPROBS, ChatCompletionChunk),
    ],
)
def test_chunks(
    client: httpx.Client, path: str, body: dict[str, Any], shape: type[BaseModel]
) -> None:
    asked = {name: value for name, value in body.items() if name != "stream_options"}
    whole, chunks = json.loads(answer(client, path, asked)), events(client, path, body)
    assert texts(chunks) == texts([whole])
    assert chunks[-1].get("usage") == (whole["usage"] if "stream_options" in body else None)
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert {"index", "finish_reason", "logprobs"} <= choice.keys()
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null is not in the type
        shape.model_validate(chunk)


@pytest.mark.parametrize(
    "changes", [{}, {"background": True}, {"include": ["message.output_text.logprobs"]}]
)
def test_typed_events(client: httpx.Client, changes: dict[str, Any]) -> None:
    reported = events(client, "/v1/responses", RESPONSE | changes)
    kinds = [type(EVENT.validate_python(event)).__name__ for event in reported]
    assert kinds[0] == "ResponseCreatedEvent"
    assert "ResponseTextDeltaEvent" in kinds
    assert kinds[-1] in ("ResponseCompletedEvent", "ResponseIncompleteEvent")


def test_models(client: httpx.Client) -> None:
    [model] = client.get("/v1/models").json()["data"]
    Model.model_validate(model)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {}),
        ("/v1/chat/completions", {"messages": [], "nonsense": 1}),
        ("/v1/responses", {"input": 1}),
        ("/v1/nothing", {}),
    ],
)
def test_errors(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    error = client.post(path, json=body).json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
