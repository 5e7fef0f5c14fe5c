"""Server-sent events: what is put on the wire."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pydantic import BaseModel

from server.api.schemas.problems import ErrorResponse
from server.api.texts import dump_json
from server.errors import LatentdError

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_WITH_IDS = b": keep-alive\n"
"""The official client takes a blank line after an event with an id for another event, an empty one:
where events have ids, the comment stands before the next event."""

DONE = b"[DONE]"
EVENT_STREAM = "text/event-stream"
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

AT_END: dict[int | str, dict[str, Any]] = {
    204: {"description": "The stream has ended, and no event follows the last one that you have."}
}
"""The documentation of a stream that is resumed behind its end."""

Piece = BaseModel | bytes
"""What an event says: a model, or what one would be as JSON."""

Write = Callable[[list[bytes]], Awaitable[None]]
"""Sends events that are there at once."""


def events_of(*models: str) -> dict[str, Any]:
    """The documentation of an answer that is a stream, by the names of what its events tell.

    OpenAPI 3.1 has no place for a stream's items: here the schema is that of one event.
    """
    told = [{"$ref": f"#/components/schemas/{model}"} for model in (*models, "ErrorResponse")]
    message = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": told},
    }
    ends = {"type": "string", "const": "[DONE]"}
    event = {
        "type": "object",
        "description": "One server-sent event. A stream of completions or of a chat ends with the "
        "event `data: [DONE]`.",
        "required": ["data"],
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[0-9]+$",
                "description": "The event's number, from 0 on, where a stream can be resumed.",
                "examples": ["0"],
            },
            "event": {
                "type": "string",
                "description": "The `type` of a response's event; others have none.",
                "examples": ["response.output_text.delta"],
            },
            "data": {
                "anyOf": [message, ends],
                "description": "One JSON object in one line, or `[DONE]`.",
                "examples": ["[DONE]"],
            },
        },
    }
    return {"content": {"text/event-stream": {"schema": event}}}


LINE_SEPARATORS = {c.encode(): b"\\u%04x" % ord(c) for c in "\u2028\u2029\x85"}
"""Not ends of lines in JSON and in a stream of events, but for clients that split lines otherwise;
JSON may escape them."""


def encode_event(piece: Piece, number: int | None = None, name: str | None = None) -> bytes:
    """A piece as an event, with its number where the stream can be resumed."""
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
    """How a kind of stream is written."""

    ends_with_done = True
    """Whether `[DONE]` is the last event."""

    def name_of(self, piece: Piece) -> str | None:
        """The name of a piece's event, where events have names."""
        del piece
        return None


class EventSink:
    """Writes the pieces of an answer as events."""

    def __init__(
        self, write: Write, format: SSEFormat, silence_s: float | None, *, has_ids: bool
    ) -> None:
        """`has_ids`: events have numbers from 0 on, for clients that resume the stream."""
        self._write = write
        self._format = format
        self._has_ids = has_ids
        self._number = 0
        self.silence_s = silence_s

    def encode(self, pieces: Iterable[Piece]) -> list[bytes]:
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

    def _event(self, piece: Piece) -> bytes:
        number, self._number = self._number, self._number + 1
        return encode_event(piece, number if self._has_ids else None, self._format.name_of(piece))


def error_piece(error: LatentdError) -> BaseModel:
    """An error as an event."""
    return ErrorResponse.model_validate(error.body())
