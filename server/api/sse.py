"""Server-sent events: wire format."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pydantic import BaseModel

from server.api.schemas.problems import ErrorResponse
from server.api.texts import dump_json
from server.errors import LatentdError

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_WITH_IDS = b": keep-alive\n"
"""The official client reads a blank line after an event with an id as another, empty event: where
events have ids, the comment precedes the next event."""

DONE = b"[DONE]"
EVENT_STREAM = "text/event-stream"
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

AT_END: dict[int | str, dict[str, Any]] = {
    204: {"description": "The stream has ended, and there are no further events."}
}
"""Documentation of resuming a stream after its end."""

EventData = BaseModel | bytes
"""Data of an event: a model, or its JSON."""

Write = Callable[[list[bytes]], Awaitable[None]]
"""Sends several events at once."""


def events_of(*models: str) -> dict[str, Any]:
    """Documentation of a streamed response, by the names of its events' models.

    OpenAPI 3.1 cannot describe a stream's items: the schema is that of one event.
    """
    schemas = [{"$ref": f"#/components/schemas/{model}"} for model in (*models, "ErrorResponse")]
    message = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": schemas},
    }
    ends = {"type": "string", "const": "[DONE]"}
    event = {
        "type": "object",
        "description": "One server-sent event. Streams of completions and chats end with "
        "`data: [DONE]`.",
        "required": ["data"],
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[0-9]+$",
                "description": "The event's number, from 0, in resumable streams.",
                "examples": ["0"],
            },
            "event": {
                "type": "string",
                "description": "The `type` of a response event; other events have none.",
                "examples": ["response.output_text.delta"],
            },
            "data": {
                "anyOf": [message, ends],
                "description": "One JSON object on one line, or `[DONE]`.",
                "examples": ["[DONE]"],
            },
        },
    }
    return {"content": {"text/event-stream": {"schema": event}}}


LINE_SEPARATORS = {c.encode(): b"\\u%04x" % ord(c) for c in "\u2028\u2029\x85"}
"""Not line breaks in JSON or SSE, but some clients split lines there; JSON may escape them."""


def encode_event(piece: EventData, number: int | None = None, name: str | None = None) -> bytes:
    """Encode an event, with its number if the stream is resumable."""
    data = piece
    if not isinstance(data, bytes):
        data = dump_json(data)
    if not data.isascii():
        for separator, escaped in LINE_SEPARATORS.items():
            data = data.replace(separator, escaped)
    event = b"" if name is None else b"event: %s\n" % name.encode()
    ending = b"\n\n" if number is None else b"\nid: %d\n\n" % number
    return b"".join((event, b"data: ", data, ending))


class SSEFormat:
    """Format of a kind of stream."""

    ends_with_done = True
    """Whether `[DONE]` is the last event."""

    def name_of(self, piece: EventData) -> str | None:
        """The name of an event, if events have names."""
        del piece
        return None


class EventSink:
    """Writes an answer as events."""

    def __init__(
        self, write: Write, format: SSEFormat, silence_s: float | None, *, has_ids: bool
    ) -> None:
        """`has_ids`: number events from 0, for clients that resume the stream."""
        self._write = write
        self._format = format
        self._has_ids = has_ids
        self._number = 0
        self.silence_s = silence_s

    def encode(self, pieces: Iterable[EventData]) -> list[bytes]:
        return [self._event(piece) for piece in pieces]

    async def send(self, events: list[bytes]) -> None:
        if events:
            await self._write(events)

    async def keep_alive(self) -> None:
        await self._write([KEEP_ALIVE])

    async def done(self) -> None:
        """End the stream."""
        if self._format.ends_with_done:
            await self.send(self.encode([DONE]))

    def _event(self, piece: EventData) -> bytes:
        number, self._number = self._number, self._number + 1
        return encode_event(piece, number if self._has_ids else None, self._format.name_of(piece))


def error_piece(error: LatentdError) -> BaseModel:
    """An error event."""
    return ErrorResponse.model_validate(error.body())
