"""`/openapi.json`: the framework's document, completed."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.api.refusals import add_examples
from server.api.schemas.chat import ChatChunk
from server.api.schemas.generation import SEED_MAX, SEED_MIN
from server.api.schemas.responses import ResponseEvent
from server.settings import Settings

REF = "#/components/schemas/{model}"
EVENTS = (ChatChunk, ResponseEvent)
"""Models of streamed events, which the framework does not see."""

TOKEN_LIMITS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"),
    "min_tokens",
)
FRAMEWORK_SCHEMAS = ("HTTPValidationError", "ValidationError")

DESCRIPTION = """\
Language models with constant memory per session.

`/v1/models`, `/v1/completions`, `/v1/chat/completions` and `/v1/responses` are OpenAI-compatible;
`/v1/sessions` stores conversations, each as one state of fixed size, and `/v1/streams` resumes
streams whose connection was lost.

Every error is an `ErrorResponse`, even in the middle of a stream. Besides those listed for each
operation, any request may get 400 `invalid_http` or 431 `headers_too_large` for invalid HTTP,
404 `not_found` for an unknown path, 405 `method_not_allowed` for an unsupported method,
413 `body_too_large`, and 421 `host_not_allowed` for an unknown Host header.
Unknown parameters are rejected, not ignored.

A stream consists of server-sent events; comments (lines that begin with a colon) keep it alive.
In a resumable stream each event has an `id:`, counting from 0. The last event of
completions and chats is `data: [DONE]`; that of a response is `response.completed`,
`response.incomplete` or `response.failed`.
"""

TAGS = [
    {"name": "completions", "description": "Text that continues a prompt."},
    {"name": "chat", "description": "Answers to conversations."},
    {
        "name": "responses",
        "description": "Stored answers; a conversation can continue from any of them.",
    },
    {"name": "sessions", "description": "Conversations stored on the server."},
    {"name": "streams", "description": "Streams that outlive their connection."},
    {"name": "tokens", "description": "Text to tokens and back."},
    {"name": "usage", "description": "Usage and limits of a key."},
    {"name": "models", "description": "The served model."},
    {"name": "operations", "description": "For orchestrators and Prometheus."},
]

REQUEST_ID = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "description": "Your id for the request, of up to 128 letters, digits and `._:/+=@-`; any "
    "other is replaced. The response and the server's log include it.",
    "schema": {"type": "string", "examples": ["req-2026-0001"]},
}
REQUEST_ID_HEADER = {
    "description": "The request's id, yours or one assigned by the server.",
    "required": True,
    "schema": {"type": "string", "examples": ["req-2026-0001"]},
}

Schema = dict[str, Any]


def complete(app: FastAPI, settings: Settings, *, requires_keys: bool) -> None:
    """Complete the app's OpenAPI document; it is built on first use."""
    framework = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = framework()
            _complete(document, settings)
            if not requires_keys:
                _open(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = whole  # type: ignore[method-assign]


def _complete(document: dict[str, Any], settings: Settings) -> None:
    schemas: dict[str, Schema] = document["components"]["schemas"]
    for name in FRAMEWORK_SCHEMAS:
        schemas.pop(name, None)
    schemas |= _schemas_of_events()
    _bound(schemas, settings)
    _exemplify(schemas)
    for operation in _operations(document):
        _drop_validation_error(operation)
        add_examples(operation)
        operation.setdefault("parameters", []).append(REQUEST_ID)
        for response in operation["responses"].values():
            response.setdefault("headers", {})["X-Request-ID"] = REQUEST_ID_HEADER


def _open(document: dict[str, Any]) -> None:
    """Make keys optional."""
    for operation in _operations(document):
        if "security" in operation:
            operation["security"].append({})


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        yield from methods.values()


def _drop_validation_error(operation: dict[str, Any]) -> None:
    """Remove the framework's 422: validation errors are 400 here."""
    content = operation["responses"].get("422", {}).get("content", {})
    if "HTTPValidationError" in str(content):
        del operation["responses"]["422"]


def _schemas_of_events() -> dict[str, Schema]:
    models = [(model, "serialization") for model in EVENTS]
    _, made = models_json_schema(models, ref_template=REF)  # type: ignore[arg-type]
    return dict(made["$defs"])


def _bound(schemas: dict[str, Schema], settings: Settings) -> None:
    """Add the bounds from the settings. A keyword applies to its own type only, so it can be added
    next to a field's alternatives."""
    for name, schema in schemas.items():
        if name.endswith("Request"):
            bounds = _bounds(name, settings)
            for field, field_schema in schema["properties"].items():
                field_schema |= bounds.get(field, {})


def _bounds(name: str, settings: Settings) -> dict[str, Schema]:
    """Bounds by field name."""
    ttl_s = settings.response_ttl_s if name == "ResponseRequest" else settings.session_ttl_s
    most = {
        **dict.fromkeys(TOKEN_LIMITS, settings.max_tokens_limit),
        **dict.fromkeys(("n", "best_of"), settings.max_n),
        **dict.fromkeys(("logprobs", "top_logprobs"), settings.max_logprobs),
        "timeout": settings.request_timeout_s,
        "ttl": ttl_s,
    }
    return {
        **{field: {"maximum": bound} for field, bound in most.items() if bound is not None},
        "stop": {"maxItems": settings.max_stop},
        "logit_bias": {"maxProperties": settings.max_logit_bias},
        "seed": {"minimum": SEED_MIN, "maximum": SEED_MAX},  # the framework rounds them
    }


def _exemplify(schemas: dict[str, Schema]) -> None:
    """Give every model and field an example."""
    examples = {name: _example_of_model(schema, schemas) for name, schema in schemas.items()}
    for name, schema in schemas.items():
        for field in schema.get("properties", {}).values():
            field["examples"] = [_example(field, schemas)]
        schema["examples"] = [examples[name]]


def _example_of_model(schema: Schema, schemas: dict[str, Schema]) -> Any:
    """Example of a model: its required fields and those with a value, merged with its own
    example."""
    fields, required = schema.get("properties", {}), schema.get("required", [])
    given: list[dict[str, Any]] = schema.get("examples", [])
    found = {
        name: _example(field, schemas)
        for name, field in fields.items()
        if not given or name in required or field.get("default") is not None
    }
    shown = {name: value for name, value in found.items() if name in required or value is not None}
    return shown | dict(*given)


def _example(schema: Schema, schemas: dict[str, Schema]) -> Any:
    """A schema's own example, or one for its type. Raises ValueError if there is none."""
    match schema:
        case {"examples": [value, *_]} | {"const": value} | {"enum": [value, *_]}:
            return value
        case {"default": value} if value is not None:
            return value
        case {"$ref": reference}:
            return _example_of_model(schemas[reference.rpartition("/")[-1]], schemas)
        case {"anyOf": [part, *_]} | {"oneOf": [part, *_]}:
            return _example(part, schemas)
        case {"type": "array", "items": item}:
            return [_example(item, schemas)]
        case {"type": "boolean"}:
            return True
        case {"type": "integer"}:
            return int(schema.get("minimum", 0))  # the framework writes bounds as floats
        case {"type": "null"}:
            return None
    raise ValueError(f"no example for: {schema}")
