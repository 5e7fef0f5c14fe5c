"""The front's side: an ASGI app that forwards its requests to the core."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import count
from typing import Any

from server.fronts.frames import (
    ANSWER_WINDOW_BYTES,
    PIECE_BYTES,
    Frame,
    FrameKind,
    first_window,
    pack_credit,
    pack_scope,
    unpack_credit,
    unpack_start,
)
from server.fronts.link import Link
from server.fronts.window import ReceiveWindow, Window

ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]


class Gateway:
    """Numbers requests and dispatches the core's frames to them."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """`stop` is called on STOP. Set `link` before the first request."""
        self.link: Link
        self._stop = stop
        self._numbers = count(1)
        self._open: dict[int, Exchange] = {}

    def handle(self, frame: Frame) -> None:
        """Handle a frame from the core."""
        if frame.kind is FrameKind.STOP:
            self._stop()
        elif frame.kind is FrameKind.PING:
            self.link.send(FrameKind.PONG)
        elif (exchange := self._open.get(frame.request)) is not None:
            exchange.handle(frame)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        number = next(self._numbers) & 0xFFFFFFFF
        exchange = self._open[number] = Exchange(self.link, number, dict(scope))
        forwarding = asyncio.create_task(exchange.forward_request(receive))
        try:
            await exchange.forward_response(send)
        finally:
            forwarding.cancel()
            del self._open[number]


class Exchange:
    """One request and its response."""

    def __init__(self, link: Link, number: int, scope: dict[str, Any]) -> None:
        self._link = link
        self._number = number
        self._scope = scope
        self._window = Window(first_window(scope))
        self._receive_window = ReceiveWindow(ANSWER_WINDOW_BYTES)
        self._incoming: deque[Frame] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def handle(self, frame: Frame) -> None:
        """Handle a frame of this request."""
        if frame.kind is FrameKind.CREDIT:
            self._window.grant(unpack_credit(frame.payload))
            return
        self._incoming.append(frame)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def forward_request(self, receive: Receive) -> None:
        """Forward the request to the core: scope, body, disconnect."""
        self._link.send(FrameKind.REQUEST, self._number, pack_scope(self._scope))
        more = True
        while True:
            if more:
                await self._window.open()
            message = await receive()
            if message["type"] == "http.disconnect":
                self._link.send(FrameKind.DISCONNECT, self._number)
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            self._window.use(len(body))
            while len(body) > PIECE_BYTES:
                self._link.send(FrameKind.BODY, self._number, body[:PIECE_BYTES])
                body = body[PIECE_BYTES:]
            self._link.send(FrameKind.BODY if more else FrameKind.LAST_BODY, self._number, body)

    async def forward_response(self, send: Send) -> None:
        """Forward the response to the client. Returns early if it is incomplete, which closes the
        connection."""
        while True:
            while not self._incoming:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            frame = self._incoming.popleft()
            match frame.kind:
                case FrameKind.START:
                    await send(unpack_start(frame.payload))
                case FrameKind.BROKEN:
                    return
                case _:
                    body, is_last = self._all_data(frame)
                    await send(
                        {"type": "http.response.body", "body": body, "more_body": not is_last}
                    )
                    if is_last:
                        return
                    if credit := self._receive_window.add(len(body)):
                        self._link.send(FrameKind.CREDIT, self._number, pack_credit(credit))

    def _all_data(self, first: Frame) -> tuple[bytes, bool]:
        """The body received so far in one piece, and whether it is complete."""
        kind, pieces = first.kind, [first.payload]
        while (
            kind is FrameKind.DATA
            and self._incoming
            and self._incoming[0].kind is not FrameKind.BROKEN
        ):
            frame = self._incoming.popleft()
            kind = frame.kind
            pieces.append(frame.payload)
        return b"".join(pieces), kind is FrameKind.LAST_DATA
