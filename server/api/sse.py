"""Server-sent events: what is put on the wire, and a response that always ends its turn."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.api.schemas.problems import ErrorResponse
from server.errors import LatentdError

KEEP_ALIVE = b": keep-alive\n"
"""A comment without the blank line that ends an event: the official client takes a blank line after
an event with an id for another event, an empty one."""

NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Message = BaseModel | bytes
"""What an event tells: a model, or what one would be as JSON."""

Messages = AsyncIterator[Sequence[Message] | None]
"""What a stream tells, as many messages at once as there are; None is a sign of life."""

Close = Callable[[], Awaitable[None]]
"""Ends the turn behind a stream; may be called more than once."""


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
        "required": ["id", "data"],
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[0-9]+$",
                "description": "The event's number, from 0 on.",
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


def error_message(error: LatentdError) -> BaseModel:
    """An error as the message of a stream."""
    return ErrorResponse.model_validate(error.body())


@dataclass(frozen=True)
class Manner:
    """How a kind of stream is written."""

    tell_error: Callable[[LatentdError], BaseModel] = error_message
    """The last message of a stream that fails."""

    kind_of: Callable[[Message], str] | None = None
    """The name of a message's event, where events have names."""

    ends_with_done: bool = True
    """Whether `[DONE]` is the last event."""


PLAIN = Manner()
"""Events without names, and `[DONE]` at the end."""


class EventSource:
    """Messages as events with ids from 0 on.

    A LatentdError among the messages becomes one, since the status was sent long ago; the turn is
    closed before that.
    """

    def __init__(self, messages: Messages, close: Close, manner: Manner = PLAIN) -> None:
        self._messages = messages
        self._close = close
        self._manner = manner
        self._number = 0
        self.outcome = "cancelled"
        """How it ended, for the metrics."""

    async def events(self) -> AsyncIterator[list[bytes]]:
        """The events as bytes, as many at once as there are, and `KEEP_ALIVE` for a sign of life.

        A list is sent at once: a system call costs as much as the making of several events.
        """
        try:
            async for messages in self._messages:
                if messages is None:
                    yield [KEEP_ALIVE]
                elif messages:
                    yield [self._event(message) for message in messages]
            self.outcome = "ok"
        except LatentdError as error:
            await asyncio.shield(self._close())  # a client may try again as soon as it sees this
            yield [self.failure(error)]
        if self._manner.ends_with_done:
            yield [self.done()]

    async def pieces(self) -> AsyncIterator[bytes]:
        """The events as bytes, those that are there at once in one piece."""
        async for events in self.events():
            yield b"".join(events)

    def failure(self, error: LatentdError) -> bytes:
        """The event that tells an error."""
        self.outcome = error.outcome
        return self._event(self._manner.tell_error(error))

    def done(self) -> bytes:
        """The event that ends a stream."""
        return self._numbered("[DONE]")

    def _event(self, message: Message) -> bytes:
        if isinstance(message, bytes):
            number, self._number = self._number, self._number + 1
            return b"data: %b\nid: %d\n\n" % (message, number)
        name = None if self._manner.kind_of is None else self._manner.kind_of(message)
        return self._numbered(message.model_dump_json(exclude_unset=True), name)

    def _numbered(self, data: str, name: str | None = None) -> bytes:
        number, self._number = self._number, self._number + 1
        return format_sse_event(data_str=data, id=str(number), event=name)


class EventStream(EventSourceResponse):
    """Sends a source's events. The turn is closed when the response ends, in whatever way, also if
    it never began."""

    def __init__(
        self, messages: Messages, close: Close, headers: dict[str, str], manner: Manner = PLAIN
    ) -> None:
        self._source = EventSource(messages, close, manner)
        self._close = close
        super().__init__(self._source.pieces(), headers=headers | NO_BUFFERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            scope["latentd.outcome"] = self._source.outcome
            await asyncio.shield(self._close())
