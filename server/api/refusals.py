"""How calls may end otherwise than well, for the documentation."""

from dataclasses import dataclass
from typing import Any

from server.api.problems import body_too_large
from server.api.schemas.base import EXAMPLE_SESSION, EXAMPLE_STREAM
from server.api.schemas.problems import ErrorResponse
from server.errors import (
    DeadlineExceeded,
    EventsGone,
    InternalError,
    InvalidRequest,
    LatentdError,
    NeedsStream,
    NotFound,
    RateLimited,
    SessionBusy,
    StorageFailed,
    StorageFull,
    Unauthorized,
    UnfitState,
)


@dataclass(frozen=True)
class _Refusal:
    """What a status means, and one of the errors that have it."""

    meaning: str
    example: LatentdError


ALL = (
    _Refusal(
        "The request is wrong: the message says what would be right, `param` where.",
        NeedsStream("stream_options"),
    ),
    _Refusal(
        "The server asks for a key, and the request has none that it knows.",
        Unauthorized("this server wants an API key: Authorization: Bearer KEY"),
    ),
    _Refusal(
        "What the request names does not exist, has expired, or is another key's.",
        NotFound(
            "there is no model 'gpt-4'; this server has 'latentd'", "model", "model_not_found"
        ),
    ),
    _Refusal(
        "The body did not arrive in time; the connection is closed.",
        InvalidRequest("the body did not arrive in time", code="request_timeout", status=408),
    ),
    _Refusal(
        "The session is busy, not at the turn that the request expects, or took another turn with "
        "this `Idempotency-Key`. Repeating the request does not help: `x-should-retry: false`.",
        SessionBusy(EXAMPLE_SESSION),
    ),
    _Refusal(
        "Of the stream's events only later ones are kept.",
        EventsGone(EXAMPLE_STREAM, 118),
    ),
    _Refusal("The body is larger than this server accepts.", body_too_large()),
    _Refusal(
        "The body is not said to be JSON, or has a Content-Encoding that is not decoded here.",
        InvalidRequest(
            "the body is of type text/plain; it must be application/json",
            code="unsupported_media_type",
            status=415,
        ),
    ),
    _Refusal(
        "The blob is not a state for this server's model: the message names what differs.",
        UnfitState("this is no state for this server: it is not a safetensors file"),
    ),
    _Refusal(
        "More than a limit or the queue allows, for `Retry-After` seconds; or more than a quota "
        "allows, for which waiting does not help.",
        RateLimited(
            "this request would exceed your limit of 60 requests a minute; try again in 7 s",
            "requests_per_minute",
            7,
        ),
    ),
    _Refusal("A fault of the server; its log tells more.", InternalError()),
    _Refusal(
        "The server is stopping, is not well, or its store failed; a session is as it was before.",
        StorageFailed("the session could not be written"),
    ),
    _Refusal("`timeout` has passed; nothing is kept.", DeadlineExceeded(5)),
    _Refusal(
        "The disk, or what the store may take of it, is full; nothing is kept.",
        StorageFull("this server holds 1000 sessions already"),
    ),
)
BY_STATUS = {refusal.example.status: refusal for refusal in ALL}

ALWAYS = (500,)
GUARDED = (401, *ALWAYS)
BODY = (400, 408, 413, 415)
STORED = (404, 503)
"""What is asked of one session or response."""

WRITTEN = (503, 507)
TURN = (404, 429, 504, *WRITTEN)

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """The documentation of these statuses."""
    return {
        status: {"model": ErrorResponse, "description": BY_STATUS[status].meaning}
        for status in sorted(set(statuses))
    }


def add_examples(operation: dict[str, Any]) -> None:
    """Put an example into each error that is documented; the framework would drop its nulls."""
    for status, response in operation["responses"].items():
        if int(status) in BY_STATUS:
            example = BY_STATUS[int(status)].example.body()
            response["content"]["application/json"]["example"] = example
