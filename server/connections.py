"""HTTP/1.1 connections: framing, and limits on their cost.

Bounded are the time, bytes and headers until a request is complete, the number of pipelined
requests, and the time that a client does not read its answer.
"""

import asyncio
import json
import logging
from asyncio import TimerHandle
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import InvalidRequest, LatentdError
from server.settings import Settings

SETTINGS = (
    "max_connections",
    *("header_timeout_s", "stall_timeout_s", "keep_alive_timeout_s"),
    *("max_header_bytes", "max_headers"),
    *("unix_socket", "tls_certificate", "tls_key", "trusted_proxies"),
)
"""The settings used here, by name."""

PIECE_BYTES = 1024
"""Bytes parsed at a time, except in a body of known length; bounds the requests parsed ahead."""

CHUNK_FRAMING_BYTES = 16
"""Bytes around each chunk of a body that do not count as headers."""

log = logging.getLogger(__name__)

ANSWER_START = b"HTTP/1.1 "
"""The first bytes of every response."""

PROBE_S = 0.05
"""Seconds before the second probe of a half-closed connection; later pauses triple."""


class Connections:
    """All connections of a process; those without a request in the order in which they became
    idle."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: OrderedDict[BoundedProtocol, None] = OrderedDict()
        self._num_open = 0
        self._has_warned = False

    def add(self, connection: "BoundedProtocol") -> bool:
        """Add a connection. False if there is no space."""
        if self._num_open >= self._most:
            self._warn()
            if not self._idle:
                return False
            oldest, _ = self._idle.popitem(last=False)
            self.remove(oldest)
            oldest.transport.abort()
        self._num_open += 1
        connection.is_counted = True
        self.rest(connection)
        return True

    def rest(self, connection: "BoundedProtocol") -> None:
        """The connection has become idle."""
        if connection.is_counted:
            self._idle[connection] = None
            self._idle.move_to_end(connection)

    def work(self, connection: "BoundedProtocol") -> None:
        """The connection has a request."""
        self._idle.pop(connection, None)

    def remove(self, connection: "BoundedProtocol") -> None:
        """The connection has ended."""
        self._idle.pop(connection, None)
        if connection.is_counted:
            connection.is_counted = False
            self._num_open -= 1

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "all %d connections are in use: idle ones are closed to make space. See "
                "--max-connections and the limit of open files (ulimit -n)",
                self._most,
            )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, and with parts of HTTP/1.1 that uvicorn lacks.

    A request's headers must be complete `header_timeout_s` after the connection was made or, on a
    reused one, after the first byte that follows the answer. Once the buffers to a client are full,
    it must read most of them within `stall_timeout_s`, else the connection is closed. Trailers and
    chunk extensions count as headers. While a request is unanswered, what follows it is not parsed,
    except for the rest of a piece, and reading pauses above a limit.

    Upgrades are ignored (RFC 9110, 7.8). HTTP/1.0 clients get no chunks. A client that closes only
    its sending side gets its answers.
    """

    settings: Settings
    counted: Connections
    flow: "_Flow"

    is_counted = False
    """Whether the connection is registered in `counted`."""

    _is_busy = False
    """Whether a complete request is unanswered."""

    _is_in_body = False
    _is_half_closed = False
    """Whether the client has closed its sending side."""

    _num_header_bytes = 0
    """Bytes of the request being parsed, without its body."""

    _num_trailers = 0
    _num_body_bytes_left = 0
    """Remaining bytes of a body of known length."""

    _running: RequestResponseCycle | None = None
    """The request being answered, or the last one; `cycle` is the last one parsed."""

    _refusal: LatentdError | None = None
    """The error response to an invalid request, while earlier requests are unanswered."""

    _timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None
    _probe_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._unread = bytearray()
        if self.counted.add(self):
            self._start_timer()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.counted.remove(self)
        self._stop_timer()
        self._stop_stall_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
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
        if self._is_waiting:
            self._hold(data)
        else:
            self._parse(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the connection until pending requests are answered.

        Not with TLS: a client that ends it reads no more.
        """
        is_incomplete = self._is_in_body and not self.pipeline
        is_encrypted = self.transport.get_extra_info("ssl_object") is not None
        if not self._is_busy or is_incomplete or is_encrypted or self._running is None:
            return False
        self._is_half_closed = True
        self._watch(self._running)
        return True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_body:  # a trailer, not a header (RFC 9110, 6.5.1)
            self._num_trailers += 1
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise InvalidRequest(
                    "CONNECT is not supported: this server is not a proxy", code="invalid_http"
                )
            return  # `_feed` parses it again
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > self.settings.max_header_bytes:
            raise self._too_large()
        self._check_number_of_headers()
        self._num_header_bytes = num_bytes  # excludes what follows the headers in this piece
        self._num_body_bytes_left = next(
            (int(value) for name, value in self.headers if name == b"content-length"), 0
        )
        self._is_busy = self._is_in_body = True
        self.counted.work(self)
        self._stop_timer()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Parser callback."""
        self._num_header_bytes -= CHUNK_FRAMING_BYTES

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes -= len(body)
        if self._num_body_bytes_left:
            self._num_body_bytes_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_in_body, self._num_header_bytes, self._num_trailers = False, 0, 0
        if not self._is_busy:  # answered before it was complete
            self._stop_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._is_busy = bool(self.pipeline)
        self.flow.is_full = self.flow.is_full and self._is_busy
        super().on_response_complete()
        if self._is_busy or self.transport.is_closing():
            return
        self.counted.rest(self)
        if self._refusal is not None:
            self._close_with(self._refusal)
        elif self._unread:
            data = bytes(self._unread)
            self._unread.clear()
            self._parse(data)
        if self._is_half_closed and not self._is_busy:
            self.transport.close()

    @property
    def _is_waiting(self) -> bool:
        """Whether parsing waits for an answer to complete."""
        return self._is_busy and not self._is_in_body

    def _hold(self, data: bytes | memoryview) -> None:
        self._unread += data
        if len(self._unread) > HIGH_WATER_LIMIT:
            self.flow.is_full = True
            self.flow.pause_reading()

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest and not self._is_waiting:
            try:
                num_parsed = self._feed(rest[: self._num_body_bytes_left or PIECE_BYTES])
            except LatentdError as error:
                self._refuse(error)
                return
            except HttpParserError as error:
                cause = error.__context__  # raised by a callback
                if not isinstance(cause, LatentdError):
                    cause = InvalidRequest("Invalid HTTP request received.", code="invalid_http")
                self._refuse(cause)
                return
            rest = rest[num_parsed:]
        if rest:
            self._hold(rest)
        if not self._is_busy and (self._num_header_bytes or self._is_in_body):
            self._start_timer()

    def _feed(self, piece: memoryview) -> int:
        """Parse a piece; returns the number of bytes parsed.

        Raises HttpParserError and LatentdError.
        """
        num_parsed = len(piece)
        self._num_header_bytes += num_parsed
        try:
            self.parser.feed_data(piece)
        except HttpParserUpgrade as stop:
            # llhttp would treat what follows as another protocol, so hide the upgrade.
            num_parsed = stop.args[0]
            self._num_header_bytes -= len(piece) - num_parsed
            head = b"%b %b HTTP/%b\r\n" % (
                *(self.parser.get_method(), self.url),
                self.parser.get_http_version().encode(),
            )
            headers = (b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head + b"".join(headers) + b"\r\n")
        self._num_header_bytes = max(self._num_header_bytes, 0)  # small chunks earn no credit
        if self._num_header_bytes > self.settings.max_header_bytes:
            raise self._too_large()
        self._check_number_of_headers()
        return num_parsed

    def _check_number_of_headers(self) -> None:
        if len(self.headers or ()) + self._num_trailers > self.settings.max_headers:
            raise self._too_large()

    def _too_large(self) -> LatentdError:
        return InvalidRequest(
            f"there are more than {self.settings.max_headers} headers, or they exceed "
            f"{self.settings.max_header_bytes} bytes",
            code="headers_too_large",
            status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        )

    def _refuse(self, problem: LatentdError) -> None:
        """Answer the request being parsed with an error, in order, and close the connection."""
        if self._is_in_body and self.pipeline:
            self.pipeline.popleft()
        elif self._is_in_body:
            if self.cycle.response_started:  # too late for another answer
                self.transport.close()
            else:
                self._close_with(problem)
            return
        self._is_in_body = False
        if self._is_busy:
            self._refusal = problem
        else:
            self._close_with(problem)

    def _close_with(self, problem: LatentdError) -> None:
        """Invalid requests never reach the application, but get errors in the same form."""
        log.info(
            "connection refused",
            extra={
                "fields": {"error": problem.code, "client": self.client and self.client[0]},
                "limited": f"connection refused: {problem.code}",
            },
        )
        self.transport.write(_answer(problem))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Callable[..., Any]) -> None:
        self._running = cycle
        if cycle.scope["http_version"] != "1.1":
            app = _without_chunks(cycle, app)
        if self._is_half_closed:
            self._watch(cycle)
        super()._start_asgi_task(cycle, app)

    def _watch(self, cycle: RequestResponseCycle) -> None:
        """Detect that a half-closed client has gone.

        A half-closed connection looks the same whether the client still reads or not. If it does
        not, a byte written to it is answered with a reset, which the next write reports.
        """
        cycle.waiting_for_100_continue = False
        cycle.transport = begun = _BegunTransport(self.transport)
        self._probe(cycle, begun, 0)

    def _probe(
        self, cycle: RequestResponseCycle, begun: "_BegunTransport", num_probes: int
    ) -> None:
        if cycle.response_complete or num_probes == len(ANSWER_START):
            return
        if not cycle.response_started:
            begun.write_one_byte()
        elif cycle.chunked_encoding:
            self.transport.write(b"0")  # a valid start of the next chunk's size
        self._probe_timer = self.loop.call_later(
            PROBE_S * 3**num_probes, self._probe, cycle, begun, num_probes + 1
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


class _Flow(FlowControl):
    """Keeps reading paused while too much is unread, whoever resumes it."""

    is_full = False

    def resume_reading(self) -> None:
        if not self.is_full:
            super().resume_reading()


class _BegunTransport(asyncio.Transport):
    """A connection on which an answer's first bytes are written before the rest is known."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self.num_written = 0

    def write_one_byte(self) -> None:
        self._transport.write(ANSWER_START[self.num_written : self.num_written + 1])
        self.num_written += 1

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        self._transport.write(data[self.num_written :])
        self.num_written = 0

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def uvicorn_config(
    app: Callable[..., Any], settings: Settings, last_bytes_s: int
) -> uvicorn.Config:
    """uvicorn's configuration; the last answers have `last_bytes_s` to reach their clients."""
    protocol = type(
        "Protocol",
        (BoundedProtocol,),
        {"settings": settings, "counted": Connections(settings.connection_limit)},
    )
    # Anyone who may open the Unix socket is trusted.
    trusts_all = settings.unix_socket is not None or "*" in settings.trusted_proxies
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=last_bytes_s,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        forwarded_allow_ips="*" if trusts_all else [*settings.trusted_proxies],
    )


def _answer(problem: LatentdError) -> bytes:
    body = json.dumps(problem.body()).encode()
    head = (
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


def _without_chunks(cycle: RequestResponseCycle, app: Callable[..., Any]) -> Callable[..., Any]:
    """For HTTP/1.0, where the end of the connection ends a body (RFC 9112, 6.1 and 6.3)."""
    cycle.keep_alive = False
    cycle.waiting_for_100_continue = False

    async def run(scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        async def send_without_chunks(message: Any) -> None:
            if message["type"] == "http.response.start":
                cycle.chunked_encoding = False
            else:  # of unknown length: each part may be the last
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_without_chunks)

    return run
