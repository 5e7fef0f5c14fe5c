"""Connections: those that send nothing, too little or too much are closed; slow ones are not."""

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from uvicorn.server import ServerState

from server.connections import BoundedProtocol, uvicorn_config
from server.settings import Settings
from tests.patience import PATIENCE_S, until, wait_until
from tests.server.api.calls import complete
from tests.server.live import LiveServer, live_server, tiny_settings

HEADER_S, BODY_S, IDLE_S = 1.0, 0.4, 1


@pytest.fixture(scope="module")
def impatient(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with short time limits."""
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
    """A server with size limits only."""
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
    """All data until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of a complete response on a persistent connection."""
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


@pytest.mark.long
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"GET /v1/mod",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost",
    ],
)
def test_half_a_request_is_cut(impatient: LiveServer, sent: bytes) -> None:
    started = time.monotonic()
    with closing(connect(impatient)) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""
    assert time.monotonic() - started > HEADER_S * 0.9


@pytest.mark.long
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


@pytest.mark.long
def test_a_request_on_a_used_connection_has_the_same_time(impatient: LiveServer) -> None:
    with closing(connect(impatient)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer(connection)[0] == 200
        time.sleep(HEADER_S * 1.2)  # not begun yet, and not idle for too long
        started = time.monotonic()
        connection.sendall(b"GET /v1/models HTTP/1.1\r\n")
        assert rest(connection) == b""
    assert time.monotonic() - started > HEADER_S * 0.9


@pytest.mark.long
def test_an_idle_connection_is_closed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, keep_alive_timeout_s=IDLE_S)
    with live_server(settings) as server, closing(connect(server)) as connection:
        started = time.monotonic()
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer(connection)
        assert rest(connection) == b""
        assert time.monotonic() - started > IDLE_S * 0.9


@pytest.mark.long
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


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


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
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + headers + b"\r\n\r\n")
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_headers_without_end_are_refused(connection: socket.socket) -> None:
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: ")
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
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: ")
    connection.sendall(b"y" * 3000)
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_requests_in_one_piece_are_answered_in_order(connection: socket.socket) -> None:
    one = b"GET /v1/models/%b HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 1500 + b"%b\r\n\r\n"
    connection.sendall(one % (b"first", b"") + one % (b"second", b"\r\nconnection: close"))
    answers = rest(connection).split(b"HTTP/1.1 ")[1:]
    assert [status[:3] for status in answers] == [b"404", b"404"]
    assert b"'first'" in answers[0]
    assert b"'second'" in answers[1]


def test_what_is_not_http_gets_an_error_object(connection: socket.socket) -> None:
    connection.sendall(b"hello\r\n\r\n")
    assert parsed(rest(connection)) == (400, "invalid_http")


BODY = b'{"prompt": "a", "max_tokens": 1}'
OTHER = b"GET /v1/models/smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"
OFFERS = {
    "none": b"",
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n",
    "websocket": b"Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\n",
    "two": b"upgrade: a\r\nconnection: upgrade\r\nupgrade: b/1, c\r\n",
}


def statuses(raw: bytes) -> list[int]:
    return [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:]]


def with_length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length: %d\r\n" % len(body), body


def in_chunks(body: bytes) -> tuple[bytes, bytes]:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    return b"transfer-encoding: chunked\r\n", chunks + b"0\r\nx-trailer: a\r\n\r\n"


@pytest.mark.parametrize("is_later", [False, True])
@pytest.mark.parametrize("framed", [with_length, in_chunks])
@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_to_upgrade_is_ignored(
    connection: socket.socket, offer: str, framed: Any, is_later: bool
) -> None:
    """The body belongs to the request, in the same packet or a later one."""
    for content, expected in ((BODY, 200), (OTHER, 400)):
        header, body = framed(content)
        request = POST + OFFERS[offer] + header
        if is_later:
            connection.sendall(request + b"expect: 100-continue\r\n\r\n")
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
        else:
            connection.sendall(request + b"\r\n" + body)
        assert answer(connection)[0] == expected
    connection.sendall(
        b"GET /v1/models/x HTTP/1.1\r\nhost: localhost\r\n" + OFFERS[offer] + b"\r\n"
    )
    assert "'x'" in answer(connection)[1]["error"]["message"]


def test_offers_do_not_disorder_a_pipeline(connection: socket.socket) -> None:
    header, body = with_length(BODY)
    one = POST + OFFERS["h2c"] + header + b"\r\n" + body
    last = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n"
    last += b"connection: close, upgrade\r\nupgrade: a\r\n\r\n"
    connection.sendall(3 * (one + OTHER) + last)
    assert statuses(rest(connection)) == 3 * [200, 404] + [200]


@pytest.mark.parametrize("target", [b"a:443", b"/v1/models"])
def test_nothing_goes_through_a_tunnel(connection: socket.socket, target: bytes) -> None:
    connection.sendall(b"CONNECT " + target + b" HTTP/1.1\r\nhost: localhost\r\n\r\n" + OTHER)
    assert parsed(rest(connection)) == (400, "invalid_http")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_old_clients_get_no_chunks(
    connection: socket.socket, version: bytes, is_stream: bool
) -> None:
    body = json.dumps(json.loads(BODY) | {"stream": is_stream}).encode()
    head = POST.replace(b"1.1", version) + b"connection: close\r\n"
    connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    head, _, content = rest(connection).partition(b"\r\n\r\n")
    assert statuses(head) == [200]
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    assert is_chunked == (is_stream and version == b"1.1")
    if is_stream and not is_chunked:
        assert content.startswith(b"data: ")
        assert content.endswith(b"data: [DONE]\n\n")
    elif not is_stream:
        assert b"content-length: %d\r\n" % len(content) in head.lower()
        assert json.loads(content)["object"] == "text_completion"


def test_old_clients_are_not_asked_to_continue(connection: socket.socket) -> None:
    connection.sendall(POST.replace(b"1.1", b"1.0") + b"expect: 100-continue\r\n")
    connection.sendall(b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    assert statuses(rest(connection)) == [200]


@pytest.mark.parametrize(
    "tail",
    [
        b"0\r\n" + b"a:\r\n" * 21,
        b"0\r\na: " + b"b" * 3000,
        b"0\r\n" + b"a" * 3000,
        b"0;" + b"a" * 3000,
        b"1\r\n \r\n" * 2000 + b"0\r\na: " + b"b" * 4000,
        b"1;" + b"a" * 1500 + b"\r\n \r\n" + b"1;" + b"a" * 1500,
    ],
)
def test_what_follows_the_headers_counts_as_headers(connection: socket.socket, tail: bytes) -> None:
    connection.sendall(POST + b"transfer-encoding: chunked\r\n\r\n" + tail)
    assert parsed(rest(connection)) == (431, "headers_too_large")


def test_trailers_are_no_headers(connection: socket.socket) -> None:
    chunks = b"%x;a=b\r\n%b\r\n0\r\nx-session-id: none\r\n\r\n" % (len(BODY), BODY)
    connection.sendall(POST + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    assert answer(connection)[0] == 200


def test_every_request_sent_ahead_is_answered_in_order(connection: socket.socket) -> None:
    """Of every size: also if one ends in the middle of a piece, or spans many."""
    numbers = range(400)
    requests = []
    for number in numbers:
        body = b"%d%b" % (number, b" " * (37 * number % 3000))
        framed = (with_length, in_chunks)[number % 2](body)
        head = b"POST /v1/none HTTP/1.1\r\nhost: localhost\r\nx-request-id: id-%d-\r\n" % number
        requests.append(head + b"\r\n".join(framed))
    requests.append(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    sent = b"".join(requests)
    connection.setblocking(False)
    raw, is_open = b"", True
    while is_open:
        readable, writable, _ = select.select([connection], [connection] if sent else [], [])
        if writable:
            sent = sent[connection.send(sent[:100_000]) :]
        if readable:
            part = connection.recv(65536)
            raw, is_open = raw + part, bool(part)
    assert statuses(raw) == len(numbers) * [404] + [200]
    places = [raw.index(b"id-%d-" % number) for number in numbers]
    assert places == sorted(places)


def test_a_fault_is_answered_in_its_turn(connection: socket.socket) -> None:
    """Earlier requests are answered completely first."""
    body = b'{"prompt": "a", "max_tokens": 30, "ignore_eos": true, "stream": true}'
    good = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    for bad in (b"x\r\n\r\n", POST + b"transfer-encoding: chunked\r\n\r\nx"):
        with closing(socket.create_connection(connection.getpeername(), PATIENCE_S)) as other:
            other.sendall(good + bad)
            raw = rest(other)
        assert statuses(raw) == [200, 400]
        assert b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 400" in raw


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_sends_no_more_is_answered(patient: LiveServer, is_stream: bool) -> None:
    """Even long after it closed its sending side, and whatever it had pipelined."""
    asked = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": is_stream}
    body = json.dumps(asked).encode()
    with closing(connect(patient)) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        patient.wait_until_running(1)
        connection.sendall(OTHER)
        connection.shutdown(socket.SHUT_WR)
        raw = rest(connection)
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert raw.count(b"HTTP/1.1 404 Not Found\r\n") == 1
    if is_stream:
        assert b"data: [DONE]\n\n" in raw
    else:
        content = raw.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1 404")[0]
        assert json.loads(content)["usage"]["completion_tokens"] == 3000


@pytest.mark.parametrize("sent", [b"", b"GET /v1/mod", POST + b"content-length: 9\r\n\r\n{"])
def test_half_a_request_and_no_more_to_come_is_cut(patient: LiveServer, sent: bytes) -> None:
    with closing(connect(patient)) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


@pytest.mark.parametrize("ahead", [b"", OTHER])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_disconnected_client_is_not_answered(
    patient: LiveServer, is_stream: bool, ahead: bytes
) -> None:
    """Although the server only sees the end of its sending at first."""
    cancelled = patient.num_answered("cancelled")
    asked = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": is_stream}
    body = json.dumps(asked).encode()
    with closing(connect(patient)) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        patient.wait_until_running(1)
        connection.sendall(ahead)
        if is_stream:
            connection.shutdown(socket.SHUT_WR)  # so that what is unread resets nothing yet
    wait_until(lambda: patient.num_answered("cancelled") == cancelled + 1)
    patient.wait_until_idle()


def test_a_disconnected_client_leaves_the_queue(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Although nothing but the response's headers could be sent to it yet."""
    body = b'{"prompt": "a", "max_tokens": 60000, "ignore_eos": true, "stream": %b}'
    request = POST + b"content-length: %d\r\n\r\n" + body
    settings = tiny_settings(
        tiny_checkpoint, tmp_path, max_running=1, stream_keepalive_s=10 * PATIENCE_S
    )
    with live_server(settings) as server, closing(connect(server)) as first:
        first.sendall(request % (len(body % b"false"), b"false"))
        server.wait_until_running(1)
        with closing(connect(server)) as second:
            second.sendall(request % (len(body % b"true"), b"true"))
            assert second.recv(65536).startswith(b"HTTP/1.1 200 OK")
            wait_until(lambda: server.num_waiting() == 1)
            second.shutdown(socket.SHUT_WR)
        wait_until(lambda: server.num_answered("cancelled") == 1)
        assert server.num_answered("ok") == 0  # the first still runs


class Recorder(asyncio.Transport):
    """A connection without a network."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reads = True
        self._is_closing = False

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        self.written += data

    def close(self) -> None:
        self._is_closing = True

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


def test_requests_sent_ahead_are_bounded(tmp_path: Path) -> None:
    """In number and bytes, while the application watches for a disconnect."""
    may_answer = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/"
        watching = asyncio.ensure_future(receive())
        await may_answer.wait()
        watching.cancel()
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body"})

    async def send_ahead() -> None:
        settings = Settings(checkpoint=tmp_path)
        config = uvicorn_config(app, settings, 1)
        protocol = cast(Any, config.http)(config, ServerState(), {})
        assert isinstance(protocol, BoundedProtocol)
        transport = Recorder()
        protocol.connection_made(transport)
        num_sent = 0
        for _ in range(10):
            for _ in range(100):
                if transport.reads:
                    protocol.data_received(b"GET / HTTP/1.1\r\n\r\n" * 1000)
                    num_sent += 1000
            assert not transport.reads
            assert len(protocol.pipeline) < 100
            await asyncio.sleep(0)  # the application runs
        assert num_sent < 10_000
        may_answer.set()
        await until(lambda: transport.written.count(b" 204 ") == num_sent)
        assert transport.reads
        protocol.connection_lost(None)

    asyncio.run(send_ahead())


def test_an_idle_connection_outlives_those_of_clients(tmp_path: Path) -> None:
    """httpx keeps its own for 5 s, aiohttp for 15 s, nginx for 60 s."""
    assert Settings(checkpoint=tmp_path).keep_alive_timeout_s > 60


@pytest.mark.long
def test_a_request_answered_early_leaves_an_idle_connection(impatient: LiveServer) -> None:
    """It is not closed like one with an incomplete request."""
    with closing(connect(impatient)) as connection:
        connection.sendall(
            b"POST /v1/none HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\na"
        )
        assert answer(connection)[0] == 404
        connection.sendall(b"bcd")
        time.sleep(HEADER_S * 1.5)
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer(connection)[0] == 200


@pytest.fixture(scope="module")
def few(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server for few connections."""
    folder = tmp_path_factory.mktemp("data")
    with live_server(tiny_settings(tiny_checkpoint, folder, max_connections=4)) as running:
        yield running


ALIVE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"


def test_silent_connections_make_space_the_oldest_first(few: LiveServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(few))) for _ in range(4)]
        silent[0].sendall(ALIVE)
        assert answer(silent[0])[0] == 200  # it has been idle for the shortest time now
        last = stack.enter_context(closing(connect(few)))
        last.sendall(ALIVE)
        assert answer(last)[0] == 200
        assert rest(silent[1]) == b""
        for connection in (silent[0], silent[2], silent[3], last):
            connection.sendall(ALIVE)
            assert answer(connection)[0] == 200


def test_connections_with_a_request_stay(few: LiveServer) -> None:
    body = json.dumps({"prompt": [1], "max_tokens": 50_000, "ignore_eos": True, "stream": True})
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    request = f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    with ExitStack() as stack:
        busy = [stack.enter_context(closing(connect(few))) for _ in range(4)]
        for connection in busy:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with closing(connect(few)) as refused:
            assert rest(refused) == b""
        for connection in busy:
            assert connection.recv(100)
    wait_until(lambda: few.num_waiting() == 0)
    few.wait_until_idle()
    with closing(connect(few)) as connection:
        connection.sendall(ALIVE)
        assert answer(connection)[0] == 200
