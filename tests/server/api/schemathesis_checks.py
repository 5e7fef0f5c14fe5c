"""Additional checks for schemathesis on this server; loaded by `st`."""

import json
from typing import Any

import schemathesis
from schemathesis import Case

MISSHAPEN = {
    "invalid_body",
    "invalid_json",
    "missing_required_parameter",
    "unknown_parameter",
    "unsupported_media_type",
    "unsupported_parameter",
}
"""Codes for errors that a schema can express. `invalid_value` is also used for conflicting
parameters; for an invalid shape, its message begins with the parameter."""

UNTOLD = ("surrogate", "this server's model does not think")
"""Schemas cannot exclude unpaired surrogates, nor express what the model supports."""


@schemathesis.check
def valid_shape_is_known(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: Case[Any]
) -> None:
    """What fits the schema is not rejected as if it did not."""
    del ctx
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if response.status_code in (400, 415) and is_json(response):
        error = response.json()["error"]
        assert not is_misshapen(error) or any(u in error["message"] for u in UNTOLD), error


@schemathesis.check
def errors_are_error_objects(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: Case[Any]
) -> None:
    """Also those that are not documented for each call."""
    del ctx
    if response.status_code >= 400 and response.request.method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        assert len(response.content) < 2000, "what is wrong is told in a few words"
    del case


@schemathesis.check
def streams_end_properly(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: Case[Any]
) -> None:
    """The last event of every stream marks the end. Ids count from the first event, or there are
    none, and then each comment is a separate block."""
    del ctx
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    text = response.content.decode()
    if not text and "after=" in str(response.request.url):
        return  # nothing is behind the last event
    assert text.endswith("\n\n"), text[-200:]
    blocks = [block for block in text[:-2].split("\n\n") if block != ": keep-alive"]
    events = [fields(block) for block in blocks]
    ids = [int(event["id"]) for event in events if "id" in event]
    if ids:
        assert ids == [ids[0] + place for place in range(len(events))]
    else:
        assert not [block for block in blocks if block.startswith(":")]
    last = events[-1]["data"]
    is_typed = "event" in events[-1]
    kinds = ("response.completed", "response.incomplete", "response.failed")
    assert json.loads(last)["type"] in kinds if is_typed else last == "[DONE]", last
    del case


def is_misshapen(error: dict[str, str | None]) -> bool:
    is_named = str(error["message"]).startswith(f"{error['param']}: ")
    is_json_in_a_query = error["param"] == "metadata"
    is_wrong = error["code"] == "invalid_value" and is_named and not is_json_in_a_query
    return error["code"] in MISSHAPEN or is_wrong


def is_json(response: schemathesis.Response) -> bool:
    return response.headers.get("content-type", [""])[0].startswith("application/json")


def fields(event: str) -> dict[str, str]:
    """Fields of an event, without keep-alives."""
    lines = [line for line in event.split("\n") if not line.startswith(":")]
    return dict(line.split(": ", 1) for line in lines)
