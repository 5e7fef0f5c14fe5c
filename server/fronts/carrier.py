"""The core's side: runs the app for the requests forwarded by one front."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any

from server.fronts.frames import (
    ANSWER_WINDOW_BYTES,
    PIECE_BYTES,
    REQUEST_WINDOW_BYTES,
    Frame,
    Kind,
    first_window,
    pack_credit,
    pack_start,
    unpack_credit,
    unpack_scope,
)
from server.fronts.link import Link
from server.fronts.window import Taken, Window

Message = MutableMapping[str, Any]
App = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[Message]],
        Callable[[Message], Awaitable[None]],
    ],
    Awaitable[None],
]
"""An ASGI application."""

log = logging.getLogger(__name__)
GONE: Message = {"type": "http.disconnect"}


class Carrier:
    """The requests of one front."""

    def __init__(self, app: App, tasks: set[asyncio.Task[None]], ready: Callable[[], None]) -> None:
        """Each request runs as one of `tasks`; `ready` is called once the front is listening."""
        self._app = app
        self._tasks = tasks
        self._ready = ready
        self._requests: dict[int, CarriedRequest] = {}
        self.link = Link(self._take, self._lost)
        self.heard_at = monotonic()
        """When the front answered last."""

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST:
            self._begin(frame)
        elif frame.kind is Kind.READY:
            self._ready()
        elif frame.kind is Kind.PONG:
            self.heard_at = monotonic()
        elif (request := self._requests.get(frame.request)) is not None:
            request.take(frame)

    def _begin(self, frame: Frame) -> None:
        request = CarriedRequest(self.link, frame.request, unpack_scope(frame.payload))
        self._requests[frame.request] = request
        task = asyncio.get_running_loop().create_task(request.run(self._app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._requests.pop(frame.request, None))

    def _lost(self) -> None:
        for request in self._requests.values():
            request.disconnect()


class CarriedRequest:
    """One forwarded request, as the app sees it: what uvicorn is for a direct one."""

    def __init__(self, link: Link, number: int, scope: dict[str, Any]) -> None:
        self._link = link
        self._number = number
        self._scope = scope
        self._came: deque[Message] = deque()
        self._happened = asyncio.Event()
        self._window = Window(ANSWER_WINDOW_BYTES)
        self._taken = Taken(REQUEST_WINDOW_BYTES)
        self._is_to_ask = first_window(scope) == 0
        self._is_gone = False
        self._is_complete = False

    async def run(self, app: App) -> None:
        """Run the app, and notify the front if its response is incomplete."""
        try:
            await app(self._scope, self._receive, self._send)
        except Exception:
            log.exception("a forwarded request failed")
        finally:
            if not self._is_complete:
                self._link.send(Kind.BROKEN, self._number)

    def take(self, frame: Frame) -> None:
        """Handle a frame of this request."""
        match frame.kind:
            case Kind.CREDIT:
                self._window.give(unpack_credit(frame.payload))
            case Kind.BODY | Kind.LAST_BODY:
                more = frame.kind is Kind.BODY
                self._came.append(
                    {"type": "http.request", "body": frame.payload, "more_body": more}
                )
                self._happened.set()
            case Kind.DISCONNECT:
                self.disconnect()

    def disconnect(self) -> None:
        """The client or the front has disconnected."""
        self._is_gone = True
        self._window.lift()
        self._happened.set()

    async def _receive(self) -> Message:
        if self._is_to_ask:
            self._is_to_ask = False
            self._link.send(Kind.CREDIT, self._number, pack_credit(REQUEST_WINDOW_BYTES))
        while not (self._came or self._is_gone or self._is_complete):
            self._happened.clear()
            await self._happened.wait()
        if self._is_gone or self._is_complete:
            return dict(GONE)
        message = self._came.popleft()
        if credit := self._taken.add(len(message["body"])):
            self._link.send(Kind.CREDIT, self._number, pack_credit(credit))
        return message

    async def _send(self, message: Message) -> None:
        if self._is_gone or self._is_complete:
            return
        if message["type"] == "http.response.start":
            self._link.send(Kind.START, self._number, pack_start(dict(message)))
            return
        body = message.get("body", b"")
        if len(body) > PIECE_BYTES:
            body = await self._all_but_the_last_piece(memoryview(body))
        if not self._window.is_open:
            await self._window.open()
        if message.get("more_body", False):
            self._data(Kind.DATA, body)
        elif not self._is_gone:
            self._data(Kind.LAST_DATA, body)
            self._is_complete = True
            self._happened.set()

    async def _all_but_the_last_piece(self, body: memoryview) -> bytes:
        """Send all pieces but the last. Returns the last."""
        start = 0
        while len(body) - start > PIECE_BYTES:
            await self._window.open()
            self._data(Kind.DATA, bytes(body[start : start + PIECE_BYTES]))
            start += PIECE_BYTES
        return bytes(body[start:])

    def _data(self, kind: Kind, body: bytes) -> None:
        if not self._is_gone:
            self._window.use(len(body))
            self._link.send(kind, self._number, body)
