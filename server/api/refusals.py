"""Error responses of operations, for the documentation."""

from dataclasses import dataclass
from typing import Any

from server.api.problems import body_too_large
from server.api.schemas.base import EXAMPLE_SESSION, EXAMPLE_STREAM
from server.api.schemas.problems import ErrorResponse
from server.errors import (
    DeadlineExceeded,
    EventsGone,
    IncompatibleState,
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
)


@dataclass(frozen=True)
class _Refusal:
    """A status: its meaning, and an example error."""

    meaning: str
    example: LatentdError


ALL = (
    _Refusal(
        "The request is invalid: see the message and `param`.",
        NeedsStream("stream_options"),
    ),
    _Refusal(
        "The API key is missing or invalid.",
        Unauthorized("an API key is required: Authorization: Bearer KEY"),
    ),
    _Refusal(
        "The named object does not exist, has expired, or belongs to another key.",
        NotFound("unknown model 'gpt-4'; this server serves 'latentd'", "model", "model_not_found"),
    ),
    _Refusal(
        "The body did not arrive in time; the connection is closed.",
        InvalidRequest("the body did not arrive in time", code="request_timeout", status=408),
    ),
    _Refusal(
        "The session is busy, at another turn than expected, or ran another request with "
        "this `Idempotency-Key`. Do not retry: `x-should-retry: false`.",
        SessionBusy(EXAMPLE_SESSION),
    ),
    _Refusal(
        "The requested events are no longer stored.",
        EventsGone(EXAMPLE_STREAM, 118),
    ),
    _Refusal("The body is too large.", body_too_large()),
    _Refusal(
        "The body's Content-Type is not JSON, or its Content-Encoding is not supported.",
        InvalidRequest(
            "the body is of type text/plain; it must be application/json",
            code="unsupported_media_type",
            status=415,
        ),
    ),
    _Refusal(
        "The blob is not a state of this server's model: the message names the difference.",
        IncompatibleState("the state does not fit this server: it is not a safetensors file"),
    ),
    _Refusal(
        "A rate limit or the queue is exhausted: retry after `Retry-After` seconds; or a quota "
        "is exceeded, where waiting does not help.",
        RateLimited(
            "this request would exceed your limit of 60 requests per minute; retry in 7 s",
            "requests_per_minute",
            7,
        ),
    ),
    _Refusal("An internal error; see the server's log.", InternalError()),
    _Refusal(
        "The server is stopping or not ready, or its store failed; sessions are unchanged.",
        StorageFailed("the session could not be written"),
    ),
    _Refusal("`timeout` was exceeded; the turn was rolled back.", DeadlineExceeded(5)),
    _Refusal(
        "The disk or the store's quota is full; the turn was rolled back.",
        StorageFull("this server holds 1000 sessions already"),
    ),
)
BY_STATUS = {refusal.example.status: refusal for refusal in ALL}

ALWAYS = (500,)
GUARDED = (401, *ALWAYS)
BODY = (400, 408, 413, 415)
STORED = (404, 503)
"""Operations on one session or response."""

WRITTEN = (503, 507)
TURN = (404, 429, 504, *WRITTEN)

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """Documentation of these statuses."""
    return {
        status: {"model": ErrorResponse, "description": BY_STATUS[status].meaning}
        for status in sorted(set(statuses))
    }


def add_examples(operation: dict[str, Any]) -> None:
    """Add an example to each documented error; the framework would drop its nulls."""
    for status, response in operation["responses"].items():
        if int(status) in BY_STATUS:
            example = BY_STATUS[int(status)].example.body()
            response["content"]["application/json"]["example"] = example
