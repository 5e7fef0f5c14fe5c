"""The protocol between a core and its fronts: frames, each with a kind and a request number.

A frame is a header (kind, request number, payload length; big-endian) and a payload. Bodies are raw
bytes; a request's scope and a response's head are JSON, in which bytes are Latin-1 text.
"""

import json
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

_HEADER = Struct(">BII")
HEADER_BYTES = _HEADER.size
MAX_PAYLOAD_BYTES = 1 << 26
"""Larger than any frame; a longer one means that the stream is out of sync."""

PIECE_BYTES = 1 << 16
"""Maximum body bytes per frame, so that large bodies do not block others."""

REQUEST_WINDOW_BYTES = 1 << 18
ANSWER_WINDOW_BYTES = 1 << 16
"""Flow control: maximum bytes of a body in flight."""


class FrameKind(IntEnum):
    """Kinds of frames."""

    REQUEST = 1
    """Front: a new request; its scope."""

    BODY = 2
    LAST_BODY = 3
    """Front: a piece of the request's body."""

    DISCONNECT = 4
    """Front: the client has disconnected."""

    CREDIT = 5
    """Either: flow control; the other side may send this many more bytes."""

    START = 6
    """Core: the response's status and headers."""

    DATA = 7
    LAST_DATA = 8
    """Core: a piece of the response's body."""

    BROKEN = 9
    """Core: the response ends here, incomplete."""

    READY = 10
    """Front: it is listening. For no request, like STOP."""

    STOP = 11
    """Core: accept no new connections, and exit when the responses in progress are delivered."""

    PING = 12
    """Core: liveness probe."""

    PONG = 13
    """Front: yes."""


class FrameError(ValueError):
    """Bytes that are not a frame."""


class Frame(NamedTuple):
    kind: FrameKind
    request: int
    payload: bytes


_KINDS = {int(kind): kind for kind in FrameKind}


def header(kind: FrameKind, request: int, num_bytes: int) -> bytes:
    """Header of a frame with a payload of `num_bytes`."""
    return _HEADER.pack(kind, request, num_bytes)


class FrameReader:
    """Incremental parser of frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames completed by these bytes; exhaust the iterator. Raises FrameError."""
        if self._rest:
            data = self._rest + data
        start, end = 0, len(data)
        while end - start >= HEADER_BYTES:
            number, request, num_bytes = _HEADER.unpack_from(data, start)
            kind = _KINDS.get(number)
            if kind is None or num_bytes > MAX_PAYLOAD_BYTES:
                raise FrameError(f"a frame of kind {number} with {num_bytes} bytes")
            payload = start + HEADER_BYTES
            if payload + num_bytes > end:
                break
            start = payload + num_bytes
            yield Frame(kind, request, data[payload:start])
        self._rest = data[start:]


def pack_credit(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(4)


def unpack_credit(payload: bytes) -> int:
    return int.from_bytes(payload)


def pack_scope(scope: dict[str, Any]) -> bytes:
    """An HTTP request's ASGI scope, without process-local parts."""
    granted = {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in scope.items()
        if name in _CARRIED
    }
    return json.dumps(granted | {"headers": _text(scope["headers"])}).encode()


def unpack_scope(payload: bytes) -> dict[str, Any]:
    """Inverse of `pack_scope`."""
    scope: dict[str, Any] = json.loads(payload)
    for name in _AS_BYTES:
        scope[name] = scope[name].encode("latin-1")
    for name in ("client", "server"):
        scope[name] = None if scope[name] is None else tuple(scope[name])
    return scope | {"type": "http", "headers": _bytes(scope["headers"]), "state": {}}


def pack_start(message: dict[str, Any]) -> bytes:
    """The message `http.response.start`."""
    return json.dumps([message["status"], _text(message.get("headers", []))]).encode()


def unpack_start(payload: bytes) -> dict[str, Any]:
    status, headers = json.loads(payload)
    return {"type": "http.response.start", "status": status, "headers": _bytes(headers)}


def first_window(scope: dict[str, Any]) -> int:
    """Body bytes that a request may send before the app asks for it.

    0 for a client that sends Expect: 100-continue: the response may make the body unnecessary.
    """
    waits = any(
        name.lower() == b"expect" and value.lower() == b"100-continue"
        for name, value in scope["headers"]
    )
    return 0 if waits else REQUEST_WINDOW_BYTES


_AS_BYTES = ("raw_path", "query_string")
_CARRIED = {
    *("asgi", "http_version", "server", "client", "scheme", "root_path", "method", "path"),
    *_AS_BYTES,
}


def _text(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _bytes(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
