"""Server-sent events: a response that always ends its turn, and what it puts on the wire."""

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


class EventStream(EventSourceResponse):
    """Sends messages as events with ids from 0 on, then `[DONE]`; None is a sign of life.

    A LatentdError among the messages becomes an event, since the status was sent long ago. `close`
    is awaited before that event, and when the response ends in whatever way, also if it never
    began.
    """

    def __init__(
        self,
        messages: AsyncIterator[BaseModel | None],
        close: Callable[[], Awaitable[None]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(self._events(messages), headers=headers | NO_BUFFERING)
        self._close = close
        self.outcome = "cancelled"
        """How it ended, for the metrics."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            scope["latentd.outcome"] = self.outcome
            await asyncio.shield(self._close())

    async def _events(self, messages: AsyncIterator[BaseModel | None]) -> AsyncIterator[bytes]:
        number = 0
        try:
            async for message in messages:
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
            yield format_sse_event(data_str=json.dumps(error.body()), id=str(number))
            number += 1
        yield format_sse_event(data_str="[DONE]", id=str(number))
