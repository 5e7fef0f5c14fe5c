"""Connections: what says nothing, too little or too much is cut; what only takes long is not."""

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.patience import PATIENCE_S, wait_until
from tests.server.api.calls import complete
from tests.server.live import LiveServer, live_server, tiny_settings

HEADER_S, BODY_S, IDLE_S = 1.0, 0.4, 1


@pytest.fixture(scope="module")
def impatient(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server for which time matters."""
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        header_timeout_s=HEADER_S,
        body_timeout_s=BODY_S,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture(scope="module")
def patient(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server for which only size does."""
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        header_timeout_s=PATIENCE_S,
        body_timeout_s=PATIENCE_S,
        max_header_bytes=2000,
        max_headers=20,
    )
    with live_server(settings) as running:
        yield running


def connect(server: LiveServer) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port or 0), PATIENCE_S)


@pytest.fixture
def connection(patient: LiveServer) -> Iterator[socket.socket]:
    with closing(connect(patient)) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of a whole answer, after which the connection stays."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += connection.recv(65536)
    head, _, body = raw.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def parsed(raw: bytes) -> tuple[int, str]:
    """Status and code of an error."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), str(error["code"])


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\r\n",
        b"GET /v1/mod",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: a",
    ],
)
def test_half_a_request_is_cut(impatient: LiveServer, said: bytes) -> None:
    started = time.monotonic()
    with closing(connect(impatient)) as connection:
        connection.sendall(said)
        assert rest(connection) == b""
    assert time.monotonic() - started > HEADER_S * 0.9


@pytest.mark.parametrize(
    ("begun", "piece"),
    [(b"", b"\r\n"), (b"GET /", b"a"), (b"GET / HTTP/1.1\r\n", b"x: y\r\n")],
)
def test_headers_that_drip_are_cut(impatient: LiveServer, begun: bytes, piece: bytes) -> None:
    started = time.monotonic()
    with closing(connect(impatient)) as connection:
        connection.sendall(begun)

        def is_cut() -> bool:
            time.sleep(0.08)
            try:
                connection.sendall(piece)
            except OSError:
                return True
            return False

        wait_until(is_cut)
    assert time.monotonic() - started > HEADER_S * 0.9


def test_a_request_on_a_used_connection_has_the_same_time(impatient: LiveServer) -> None:
    with closing(connect(impatient)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        assert answer(connection)[0] == 200
        time.sleep(HEADER_S * 1.2)  # not begun yet, and not idle for too long
        started = time.monotonic()
        connection.sendall(b"GET /v1/models HTTP/1.1\r\n")
        assert rest(connection) == b""
    assert time.monotonic() - started > HEADER_S * 0.9


def test_an_idle_connection_is_closed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, keep_alive_timeout_s=IDLE_S)
    with live_server(settings) as server, closing(connect(server)) as connection:
        started = time.monotonic()
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        answer(connection)
        assert rest(connection) == b""
        assert time.monotonic() - started > IDLE_S * 0.9


def test_an_answer_may_take_longer_than_the_request(impatient: LiveServer) -> None:
    with impatient.client() as client:
        started = time.monotonic()
        while time.monotonic() - started < 3 * HEADER_S:
            complete(client, max_tokens=200)
        stream = {"prompt": [1], "max_tokens": 60_000, "ignore_eos": True, "stream": True}
        started = time.monotonic()
        with client.stream("POST", "/v1/completions", json=stream) as running:
            for _ in running.iter_lines():
                if time.monotonic() - started > 2 * HEADER_S:
                    break
        assert time.monotonic() - started > 2 * HEADER_S


POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


def test_a_body_that_does_not_come_is_answered(impatient: LiveServer) -> None:
    with closing(connect(impatient)) as connection:
        started = time.monotonic()
        connection.sendall(POST + b'content-length: 100\r\n\r\n{"prompt": ')
        raw = rest(connection)
    assert parsed(raw) == (408, "request_timeout")
    assert b"connection: close" in raw.lower()
    assert b"x-request-id" in raw.lower()
    assert time.monotonic() - started > BODY_S * 0.9


def test_a_body_that_drips_is_answered(impatient: LiveServer) -> None:
    with closing(connect(impatient)) as connection:
        connection.sendall(POST + b"content-length: 100000\r\n\r\n")

        def is_answered() -> bool:
            with suppress(OSError):  # the connection may be closed with the answer
                connection.sendall(b" ")
            time.sleep(0.05)
            ready, _, _ = select.select([connection], [], [], 0)
            return bool(ready)

        wait_until(is_answered)
        assert parsed(rest(connection)) == (408, "request_timeout")


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"y" * 3000,
        b"\r\n".join(b"x%d: " % i + b"y" * 100 for i in range(19)) + b"y" * 500,
        b"\r\n".join(b"x%d: y" % i for i in range(25)),
    ],
)
def test_too_large_headers_are_refused(connection: socket.socket, headers: bytes) -> None:
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + headers + b"\r\n\r\n")
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_headers_without_end_are_refused(connection: socket.socket) -> None:
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx: ")
    connection.sendall(b"y" * 3000)
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_bodies_do_not_count_as_headers(connection: socket.socket) -> None:
    body = json.dumps({"prompt": "a " * 3000, "max_tokens": 1}).encode()
    for _ in range(2):
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 1500):
            time.sleep(0.02)  # so that they come apart
            connection.sendall(body[start : start + 1500])
        assert answer(connection)[0] == 200
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx: ")
    connection.sendall(b"y" * 3000)
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_requests_in_one_piece_are_answered_in_order(connection: socket.socket) -> None:
    one = b"GET /v1/models/%b HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 1500 + b"%b\r\n\r\n"
    connection.sendall(one % (b"first", b"") + one % (b"second", b"\r\nconnection: close"))
    answers = rest(connection).split(b"HTTP/1.1 ")[1:]
    assert [status[:3] for status in answers] == [b"404", b"404"]
    assert b"'first'" in answers[0]
    assert b"'second'" in answers[1]


def test_what_is_not_http_gets_an_error_object(connection: socket.socket) -> None:
    connection.sendall(b"hello\r\n\r\n")
    assert parsed(rest(connection)) == (400, "invalid_http")
