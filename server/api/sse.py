"""Server-sent events: what is put on the wire, and a response that always ends its turn."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.errors import LatentdError

KEEP_ALIVE = b": keep-alive\n"
"""A comment without the blank line that ends an event: the official client takes a blank line after
an event with an id for another event, an empty one."""

NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Messages = AsyncIterator[BaseModel | None]
"""What a stream tells; None is a sign of life."""

Close = Callable[[], Awaitable[None]]
"""Ends the turn behind a stream; may be called more than once."""


class EventSource:
    """Messages as events with ids from 0 on, then `[DONE]`.

    A LatentdError among the messages becomes an event, since the status was sent long ago; the turn
    is closed before that.
    """

    def __init__(self, messages: Messages, close: Close) -> None:
        self._messages = messages
        self._close = close
        self.outcome = "cancelled"
        """How it ended, for the metrics."""

    async def events(self) -> AsyncIterator[bytes]:
        """The events as bytes, and `KEEP_ALIVE` for a sign of life."""
        number = 0
        try:
            async for message in self._messages:
                if message is None:
                    yield KEEP_ALIVE
                    continue
                yield format_sse_event(
                    data_str=message.model_dump_json(exclude_unset=True), id=str(number)
                )
                number += 1
            self.outcome = "ok"
        except LatentdError as error:
            self.outcome = error.outcome
            await asyncio.shield(self._close())  # a client may try again as soon as it sees this
            yield error_event(error, number)
            number += 1
        yield done_event(number)


class EventStream(EventSourceResponse):
    """Sends a source's events. The turn is closed when the response ends, in whatever way, also if
    it never began."""

    def __init__(self, messages: Messages, close: Close, headers: dict[str, str]) -> None:
        self._source = EventSource(messages, close)
        self._close = close
        super().__init__(self._source.events(), headers=headers | NO_BUFFERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            scope["latentd.outcome"] = self._source.outcome
            await asyncio.shield(self._close())


def error_event(error: LatentdError, number: int) -> bytes:
    """An error in the middle of a stream."""
    return format_sse_event(data_str=json.dumps(error.body()), id=str(number))


def done_event(number: int) -> bytes:
    """The last event of every stream."""
    return format_sse_event(data_str="[DONE]", id=str(number))
