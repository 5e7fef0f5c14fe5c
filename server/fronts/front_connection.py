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
    FrameKind,
    first_window,
    pack_credit,
    pack_start,
    unpack_credit,
    unpack_scope,
)
from server.fronts.link import Link
from server.fronts.window import ReceiveWindow, Window

ASGIMessage = MutableMapping[str, Any]
App = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[ASGIMessage]],
        Callable[[ASGIMessage], Awaitable[None]],
    ],
    Awaitable[None],
]
"""An ASGI application."""

log = logging.getLogger(__name__)
GONE: ASGIMessage = {"type": "http.disconnect"}


class FrontConnection:
    """The requests of one front."""

    def __init__(self, app: App, tasks: set[asyncio.Task[None]], ready: Callable[[], None]) -> None:
        """Each request runs as one of `tasks`; `ready` is called once the front is listening."""
        self._app = app
        self._tasks = tasks
        self._ready = ready
        self._requests: dict[int, ForwardedRequest] = {}
        self.link = Link(self._handle, self._lost)
        self.replied_at = monotonic()
        """Time of the front's last reply."""

    def _handle(self, frame: Frame) -> None:
        if frame.kind is FrameKind.REQUEST:
            self._begin(frame)
        elif frame.kind is FrameKind.READY:
            self._ready()
        elif frame.kind is FrameKind.PONG:
            self.replied_at = monotonic()
        elif (request := self._requests.get(frame.request)) is not None:
            request.handle(frame)

    def _begin(self, frame: Frame) -> None:
        request = ForwardedRequest(self.link, frame.request, unpack_scope(frame.payload))
        self._requests[frame.request] = request
        task = asyncio.get_running_loop().create_task(request.run(self._app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._requests.pop(frame.request, None))

    def _lost(self) -> None:
        for request in self._requests.values():
            request.disconnect()


class ForwardedRequest:
    """One forwarded request, as the app sees it: what uvicorn is for a direct one."""

    def __init__(self, link: Link, number: int, scope: dict[str, Any]) -> None:
        self._link = link
        self._number = number
        self._scope = scope
        self._incoming: deque[ASGIMessage] = deque()
        self._changed = asyncio.Event()
        self._window = Window(ANSWER_WINDOW_BYTES)
        self._receive_window = ReceiveWindow(REQUEST_WINDOW_BYTES)
        self._must_grant = first_window(scope) == 0
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
                self._link.send(FrameKind.BROKEN, self._number)

    def handle(self, frame: Frame) -> None:
        """Handle a frame of this request."""
        match frame.kind:
            case FrameKind.CREDIT:
                self._window.grant(unpack_credit(frame.payload))
            case FrameKind.BODY | FrameKind.LAST_BODY:
                more = frame.kind is FrameKind.BODY
                self._incoming.append(
                    {"type": "http.request", "body": frame.payload, "more_body": more}
                )
                self._changed.set()
            case FrameKind.DISCONNECT:
                self.disconnect()

    def disconnect(self) -> None:
        """The client or the front has disconnected."""
        self._is_gone = True
        self._window.lift()
        self._changed.set()

    async def _receive(self) -> ASGIMessage:
        if self._must_grant:
            self._must_grant = False
            self._link.send(FrameKind.CREDIT, self._number, pack_credit(REQUEST_WINDOW_BYTES))
        while not (self._incoming or self._is_gone or self._is_complete):
            self._changed.clear()
            await self._changed.wait()
        if self._is_gone or self._is_complete:
            return dict(GONE)
        message = self._incoming.popleft()
        if credit := self._receive_window.add(len(message["body"])):
            self._link.send(FrameKind.CREDIT, self._number, pack_credit(credit))
        return message

    async def _send(self, message: ASGIMessage) -> None:
        if self._is_gone or self._is_complete:
            return
        if message["type"] == "http.response.start":
            self._link.send(FrameKind.START, self._number, pack_start(dict(message)))
            return
        body = message.get("body", b"")
        if len(body) > PIECE_BYTES:
            body = await self._send_all_but_last(memoryview(body))
        if not self._window.is_open:
            await self._window.open()
        if message.get("more_body", False):
            self._data(FrameKind.DATA, body)
        elif not self._is_gone:
            self._data(FrameKind.LAST_DATA, body)
            self._is_complete = True
            self._changed.set()

    async def _send_all_but_last(self, body: memoryview) -> bytes:
        """Send all pieces but the last. Returns the last."""
        start = 0
        while len(body) - start > PIECE_BYTES:
            await self._window.open()
            self._data(FrameKind.DATA, bytes(body[start : start + PIECE_BYTES]))
            start += PIECE_BYTES
        return bytes(body[start:])

    def _data(self, kind: FrameKind, body: bytes) -> None:
        if not self._is_gone:
            self._window.use(len(body))
            self._link.send(kind, self._number, body)
