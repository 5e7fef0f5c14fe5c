"""Structured output through a real server satisfies its constraints."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.patience import PATIENCE_S
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "kind": {"enum": ["cat", "dog", "漢字"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "legs", "kind", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
GBNF = 'root ::= "a" root "b" | "c"'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    settings = tiny_settings(folder, tmp_path_factory.mktemp("data"), grammar_timeout_s=PATIENCE_S)
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def complete(client: httpx.Client, **body: object) -> list[dict[str, Any]]:
    base = {"prompt": "the cat", "max_tokens": 2000, "seed": 5}
    response = client.post("/v1/completions", json=base | body)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def chat(client: httpx.Client, **body: object) -> dict[str, Any]:
    base = {"messages": [{"role": "user", "content": "a pet"}], "max_tokens": 2000, "seed": 5}
    response = client.post("/v1/chat/completions", json=base | body)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def check_pet(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_json_of_a_schema(client: httpx.Client, temperature: float, ignore_eos: bool) -> None:
    choices = complete(
        client,
        response_format=FORMAT,
        n=4,
        temperature=temperature,
        ignore_eos=ignore_eos,
        min_tokens=3,
    )
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        check_pet(choice["text"])


def test_in_chats_and_responses(client: httpx.Client) -> None:
    check_pet(chat(client, response_format=FORMAT)["message"]["content"])
    named = {"type": "json_schema", "name": "pet", "schema": SCHEMA}
    body = {"input": "a pet", "text": {"format": named}, "max_output_tokens": 2000, "seed": 5}
    made = client.post("/v1/responses", json=body).json()
    assert made["status"] == "completed"
    check_pet(made["output"][0]["content"][0]["text"])
    assert made["text"]["format"] == named


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    [choice] = complete(client, response_format=FORMAT)
    body = {"prompt": "the cat", "max_tokens": 2000, "seed": 5, "response_format": FORMAT}
    response = client.post("/v1/completions", json=body | {"stream": True})
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    reported = [c["text"] for event in data for c in json.loads(event)["choices"]]
    assert "".join(reported) == choice["text"]


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[a-c]{3,7}(x|yz)"}, "[a-c]{3,7}(x|yz)"),
        ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"grammar": GBNF}, "a*cb*"),
        ({"json": {"enum": ["é", 5, None]}}, '"é"|5|null'),
        ({"json": '{"const": true}'}, "true"),
    ],
)
def test_other_structures(client: httpx.Client, structure: dict[str, Any], pattern: str) -> None:
    for choice in complete(client, structured_outputs=structure, n=3, max_tokens=500):
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, choice["text"]), choice["text"]
        else:
            assert choice["text"].startswith("a" * 100)  # a grammar need not have an end
    assert chat(client, structured_outputs=structure)["message"]["content"] is not None


def test_any_json_object(client: httpx.Client) -> None:
    for how in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        [choice] = complete(client, max_tokens=8000, temperature=0.5, **how)
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
        assert choice["text"].startswith("{")


def test_plain_text_asks_for_nothing(client: httpx.Client) -> None:
    plain = complete(client, max_tokens=20, ignore_eos=True)
    assert (
        complete(client, max_tokens=20, ignore_eos=True, response_format={"type": "text"}) == plain
    )


def test_others_in_the_batch_are_as_they_would_be_alone(client: httpx.Client) -> None:
    alone = complete(client, max_tokens=40, ignore_eos=True)
    both = [
        client.build_request(
            "POST",
            "/v1/completions",
            json={"prompt": "the cat", "max_tokens": 40, "seed": 5, "ignore_eos": True} | more,
        )
        for more in ({}, {"response_format": FORMAT})
    ]
    first, _ = (client.send(request).json()["choices"] for request in both)
    assert first == alone


def test_a_session_holds_what_was_said(client: httpx.Client) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    first = chat(client, response_format=FORMAT, session_id=session_id)
    check_pet(first["message"]["content"])
    second = chat(client, structured_outputs={"choice": ["yes", "no"]}, session_id=session_id)
    assert second["message"]["content"] in ("yes", "no")
    assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 2


NO_SCHEMA = {"type": "json_schema"}
BAD_SCHEMA = NO_SCHEMA | {"json_schema": {"name": "x", "schema": {"type": "nothing"}}}


@pytest.mark.parametrize(
    ("formatted", "outputs", "param", "code"),
    [
        (BAD_SCHEMA, None, "response_format", "invalid_grammar"),
        (NO_SCHEMA, None, "response_format.json_schema", "missing_required_parameter"),
        ({"type": "xml"}, None, "response_format", "invalid_value"),
        (None, {}, "structured_outputs", "invalid_value"),
        (None, {"regex": "("}, "structured_outputs.regex", "invalid_grammar"),
        (None, {"grammar": "nonsense"}, "structured_outputs.grammar", "invalid_grammar"),
        (None, {"json": "{"}, "structured_outputs.json", "invalid_grammar"),
        (None, {"choice": []}, "structured_outputs.choice", "invalid_value"),
        (None, {"regex": "a", "choice": ["b"]}, "structured_outputs", "invalid_value"),
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs", "invalid_value"),
    ],
)
def test_what_is_wrong_fails_that_request_alone(
    client: httpx.Client, formatted: object, outputs: object, param: str, code: str
) -> None:
    body = {"prompt": "the cat", "response_format": formatted, "structured_outputs": outputs}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 400
    assert complete(client, max_tokens=2)
