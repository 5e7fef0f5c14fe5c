"""What a connection may cost: time, bytes and headers before it has said what it wants, and time
while it does not take what it asked for."""

import asyncio
import json
from asyncio import TimerHandle
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import InvalidRequest, LatentdError
from server.settings import Settings

SETTINGS = (
    *("header_timeout_s", "stall_timeout_s", "keep_alive_timeout_s"),
    *("max_header_bytes", "max_headers"),
)
"""The settings that are used here, by name."""


class HeadersTooLarge(ValueError):
    """Ends the parsing of a request."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits for ever for headers, and for slow readers.

    A request's headers must be complete `header_timeout_s` after the connection was made or, on one
    that was used before, after the first byte that follows the answer. Once the buffers to a client
    are full, it must take most of what is in them within `stall_timeout_s`; otherwise it has gone.
    """

    settings: Settings

    _is_busy = False
    """Whether a request's headers are complete and it is not answered yet."""

    _is_in_body = False
    _num_header_bytes = 0
    """Of headers that are not complete yet."""

    _is_too_large = False
    _timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(
                self.settings.stall_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._is_busy:
            self._start_timer()
        if not self._is_in_body and self._num_header_bytes > self.settings.max_header_bytes:
            self._is_too_large = True
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        settings = self.settings
        if num_bytes > settings.max_header_bytes or len(self.headers) > settings.max_headers:
            self._is_too_large = True
            raise HeadersTooLarge  # the parser ends, and what calls it answers
        self._is_busy = self._is_in_body = True
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body, self._num_header_bytes = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._is_busy = bool(self.pipeline)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed never gets to the application, but its answer has the same form."""
        self.transport.write(_answer(self._problem(msg)))
        self.transport.close()

    def _problem(self, message: str) -> LatentdError:
        if not self._is_too_large:
            return InvalidRequest(message, code="invalid_http")
        settings = self.settings
        return InvalidRequest(
            f"the headers are more than {settings.max_headers} or longer than "
            f"{settings.max_header_bytes} bytes",
            code="headers_too_large",
            status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        )

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def uvicorn_config(
    app: Callable[..., Any], settings: Settings, last_bytes_s: int
) -> uvicorn.Config:
    """How the app is served; its last answers have `last_bytes_s` to reach their clients."""
    protocol = type("Protocol", (BoundedProtocol,), {"settings": settings})
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=last_bytes_s,
    )


def _answer(problem: LatentdError) -> bytes:
    body = json.dumps(problem.body()).encode()
    head = (
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
