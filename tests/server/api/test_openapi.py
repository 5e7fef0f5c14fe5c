"""The API documentation is complete and correct."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.server.api.chats import make_checkpoint
from tests.server.documented import Documented
from tests.server.live import LiveServer, live_server, tiny_settings

Json = dict[str, Any]
ERRORS = range(400, 600)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    settings = tiny_settings(
        folder,
        tmp_path_factory.mktemp("data"),
        max_tokens_limit=64,
        max_n=2,
        request_timeout_s=10,
        session_ttl_s=7200,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture(scope="module")
def document(chatting: LiveServer) -> Json:
    with chatting.client() as client:
        return dict(client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def operations(document: Json) -> dict[str, Json]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def wrong_examples(document: Json, schema: Json, examples: list[Any]) -> list[str]:
    """Errors of examples against their own schema."""
    whole = schema | {"components": document["components"]}
    validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
    return [str(error) for example in examples for error in validator.iter_errors(example)]


def takes_null_only(schema: Json) -> bool:
    return schema.get("type") == "null" or None in schema.get("enum", [])


def fields(document: Json) -> Iterator[tuple[str, Json]]:
    for name, schema in document["components"]["schemas"].items():
        for field, reported in schema.get("properties", {}).items():
            yield f"{name}.{field}", reported


def headers_and_parameters(operations: dict[str, Json]) -> Iterator[tuple[str, Json]]:
    for call, operation in operations.items():
        for parameter in operation["parameters"]:
            yield f"{call} {parameter['name']}", parameter
        for status, response in operation["responses"].items():
            for name, header in response["headers"].items():
                yield f"{call} {status} {name}", header


def test_it_is_a_document_of_openapi_3_1(document: Json) -> None:
    assert document["openapi"].startswith("3.1")
    assert "HTTPValidationError" not in str(document)
    assert "ValidationError" not in document["components"]["schemas"]
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_every_schema_and_field_is_described(document: Json) -> None:
    schemas = document["components"]["schemas"]
    assert len(schemas) > 50
    assert [name for name, schema in schemas.items() if not schema.get("description")] == []
    assert [name for name, reported in fields(document) if not reported.get("description")] == []


def test_every_schema_and_field_has_an_example(document: Json) -> None:
    schemas = document["components"]["schemas"]
    assert [name for name, schema in schemas.items() if not schema.get("examples")] == []
    bare = [
        name
        for name, reported in fields(document)
        if not reported.get("examples")
        or (None in reported["examples"] and not takes_null_only(reported))
    ]
    assert bare == []


def test_examples_are_what_their_schemas_say(document: Json) -> None:
    everything = [*document["components"]["schemas"].items(), *fields(document)]
    wrong = {
        name: problems
        for name, schema in everything
        if (problems := wrong_examples(document, schema, schema["examples"]))
    }
    assert wrong == {}


def test_every_parameter_and_header_is_described_with_examples(
    document: Json, operations: dict[str, Json]
) -> None:
    for name, reported in headers_and_parameters(operations):
        assert reported.get("description"), name
        assert reported["schema"].get("examples"), name
        assert wrong_examples(document, reported["schema"], reported["schema"]["examples"]) == [], (
            name
        )


def test_every_call_is_described(document: Json, operations: dict[str, Json]) -> None:
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    for call, operation in operations.items():
        assert operation["summary"], call
        assert operation["description"], call
        assert set(operation["tags"]) <= tags, call
        assert operation["operationId"], call
        for status, response in operation["responses"].items():
            assert response["description"], f"{call} {status}"
            assert bool(response.get("content")) == (status != "204"), f"{call} {status}"
            assert "X-Request-ID" in response["headers"], f"{call} {status}"


def test_every_error_has_one_shape(document: Json, operations: dict[str, Json]) -> None:
    for call, operation in operations.items():
        assert "500" in operation["responses"], call
        for status in [status for status in operation["responses"] if int(status) in ERRORS]:
            [(kind, reported)] = operation["responses"][status]["content"].items()
            assert kind == "application/json"
            assert reported["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
            assert wrong_examples(document, reported["schema"], [reported["example"]]) == []


def test_streams_document_the_schema_of_an_event(
    chatting: LiveServer, document: Json, operations: dict[str, Json]
) -> None:
    """And they follow it."""
    bodies: dict[str, Json] = {
        "/v1/completions": {"prompt": "the cat"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
        "/v1/responses": {"input": "hello"},
    }
    for path, body in bodies.items():
        reported = operations[f"POST {path}"]["responses"]["200"]["content"]["text/event-stream"]
        message, end = reported["schema"]["properties"]["data"]["anyOf"]
        with chatting.client() as client:
            text = client.post(path, json=body | {"stream": True}).text
        for event in filter(None, text.split("\n\n")):
            lines = dict(line.split(": ", 1) for line in event.splitlines())
            assert wrong_examples(document, reported["schema"], [lines]) == []
            if lines["data"] != end["const"]:
                schema = message["contentSchema"]
                parsed = httpx.Response(200, text=lines["data"]).json()
                assert wrong_examples(document, schema, [parsed]) == []


def test_first_examples_of_requests_are_accepted(
    chatting: LiveServer, document: Json, operations: dict[str, Json]
) -> None:
    with chatting.client() as client:
        session_id = client.post("/v1/sessions", json={"prompt": "the"}).json()["id"]
        collected = []
        for call, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            reference = schema.get("$ref") or next(
                (form["$ref"] for form in schema.get("anyOf", []) if "$ref" in form), None
            )
            if reference is None:
                continue
            method, path = call.split()
            [example] = document["components"]["schemas"][reference.split("/")[-1]]["examples"]
            path = path.replace("{session_id}", session_id)
            response = client.request(method, path, json=example)
            assert response.status_code in (200, 201), (call, response.text)
            collected.append(call)
    assert len(collected) == 8


def test_requests_say_what_the_settings_allow(document: Json) -> None:
    schemas = document["components"]["schemas"]
    chat, response = schemas["ChatRequest"], schemas["ResponseRequest"]
    assert chat["additionalProperties"] == {"type": "null"}
    assert chat["properties"]["max_completion_tokens"]["maximum"] == 64
    assert chat["properties"]["n"]["maximum"] == 2
    assert chat["properties"]["timeout"]["maximum"] == 10
    assert chat["properties"]["seed"]["maximum"] == 2**64 - 1
    assert response["properties"]["max_output_tokens"]["maximum"] == 64
    assert schemas["ForkRequest"]["properties"]["ttl"]["maximum"] == 7200
    assert response["properties"]["ttl"]["maximum"] == 30 * 86400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 429),
        ("POST", "/v1/completions", 422),
        ("DELETE", "/v1/streams/x", 409),
    ],
)
def test_an_undocumented_status_is_found(
    document: Json, method: str, path: str, status: int
) -> None:
    request = httpx.Request(method, f"http://server{path}")
    Documented(document).check(httpx.Response(401, request=request))
    with pytest.raises(AssertionError, match=str(status)):
        Documented(document).check(httpx.Response(status, request=request))


def test_the_document_is_the_same_every_time(chatting: LiveServer, document: Json) -> None:
    with chatting.client() as client:
        assert client.get("/openapi.json").json() == document
