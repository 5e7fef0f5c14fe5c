"""Malformed bytes get an error object, and never an internal error."""

import json
import logging
import socket
from urllib.parse import urlsplit

import pytest

from tests.patience import PATIENCE_S
from tests.server.live import LiveServer

OBJECT = b'{"prompt": "the cat", "max_tokens": 1}'
LINE = b"POST /v1/completions"
JSON = b"content-type: application/json\r\n"


def head(line: bytes, *headers: bytes) -> bytes:
    return (
        line
        + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        + b"".join(headers)
        + b"\r\n"
    )


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return head(b"POST " + path, JSON, length, *headers) + body


def exchange(server: LiveServer, request: bytes) -> tuple[int, bytes]:
    """Status and body of the response, until the server closes the connection."""
    address = urlsplit(server.url)
    with socket.create_connection(
        (address.hostname, address.port or 80), timeout=PATIENCE_S
    ) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


REQUESTS: list[tuple[bytes, int]] = [
    (head(b"GET /v1/sessions/%00"), 404),
    (head(b"GET /v1/sessions/%ed%a0%80/turns"), 404),
    (head(b"GET /v1/sessions/a%2fb"), 404),
    (head(b"GET /v1/sessions/%2e%2e%2fmodels"), 404),
    (head(b"GET /v1/sessions/" + b"x" * 5000), 404),
    (head(b"GET /v1/models/a/b/c"), 404),
    (head(b"GET /v1/streams/%ff%fe"), 404),
    (head(b"GET /v1/sessions?limit=%00"), 400),
    (head(b"GET /v1/sessions?limit=1&limit=x"), 400),
    (head(b"GET /v1/sessions?limit=" + b"9" * 5000), 400),
    (head(b"GET /v1/sessions?after=%ed%a0%80"), 400),
    (head(b"GET /v1/sessions?after=%00"), 400),
    (head(b"GET /v1/sessions/x/state?turn=" + b"9" * 400), 400),
    (head(b"GET /v1/sessions/x/state?turn=nan"), 400),
    (head(b"GET /v1/responses/%ff?stream=maybe"), 400),
    (head(b"GET /v1/responses/x?stream=true&starting_after=1e99"), 400),
    (head(b"GET /v1/streams/x", b"last-event-id: \xff\r\n"), 404),
    (head(b"GET /v1/models", b"x-request-id: \xff\xfe\r\n"), 200),
    (head(b"GET /v1/models", b"authorization: \xff\r\n"), 200),
    (head(b"POST /v1/sessions/import?metadata=%00", b"content-length: 1\r\n") + b"x", 400),
    (head(b"POST /v1/sessions/import?metadata=[[[[", b"content-length: 1\r\n") + b"x", 400),
    (head(b"POST /v1/sessions/import?ttl=inf", b"content-length: 1\r\n") + b"x", 400),
    (head(b"POST /v1/sessions/import", b"content-length: 0\r\n"), 422),
    (post(OBJECT, b"x-session-id: \xff\r\n"), 404),
    (post(OBJECT, b"x-session-id: \r\n"), 404),
    (post(OBJECT, b"x-session-id: a\r\nx-session-id: b\r\n"), 404),
    (post(OBJECT, b"idempotency-key: \xe9\r\n"), 400),
    (post(b'{"prompt": "\xff"}'), 400),
    (post(b'\xef\xbb\xbf{"prompt": "a"}'), 200),
    (post(json.dumps({"prompt": "a"}).encode("utf-16")), 200),
    (post(b'{"a":' * 20_000 + b"1" + b"}" * 20_000, path=b"/v1/responses"), 413),
    (post(b'{"a":' * 9_000 + b"1" + b"}" * 9_000), 400),
    (post(b'{"prompt":' + b"[" * 40_000 + b"]" * 40_000 + b"}"), 400),
    (post(b'{"response_format":' + b"[" * 900 + b"]" * 900 + b"}"), 400),
    (post(b'{"prompt": "a", "prompt": 5}'), 400),
    (post(b'{"prompt": "a", "seed": 1e999}'), 400),
    (post(b'{"prompt": "a", "seed": NaN}'), 400),
    (post(b'{"prompt": "a", "max_tokens": ' + b"1" * 4000 + b"}"), 400),
    (post(b'{"prompt": [' + b"1" * 4000 + b"]}"), 400),
    (post(b'{"prompt": "a", "session_id": "x", "expected_turn": ' + b"1" * 4000 + b"}"), 400),
    (post(b'{"tokens": [' + b"1" * 4000 + b"]}", path=b"/detokenize"), 400),
    (post(b'{"prompt": "a", "logit_bias": {"' + b"1" * 4000 + b'": 1}}'), 400),
    (post(b'{"prompt": "a", "model": "' + b"x" * 4000 + b'"}'), 404),
    (post(b'{"prompt": "a", "' + b"x" * 4000 + b'": 1}'), 400),
    (post(b'{"prompt": "a", "\\ud800": 1}'), 400),
    (post(b'{"prompt": "a", "metadata": {"\\ud800": "\\udfff"}}'), 400),
    (post(b"null", path=b"/v1/sessions"), 201),
    (post(b"[]", path=b"/v1/sessions"), 400),
    (post(b"1", path=b"/detokenize"), 400),
    (
        head(LINE, b"content-type: a/b/c;;=json\r\n", b"content-length: 2\r\n") + b"{}",
        400,
    ),
    (
        head(LINE, b"content-type: \xff\r\n", b"content-length: 2\r\n") + b"{}",
        415,
    ),
    (head(LINE, JSON, b"content-length: 999999999999999999999\r\n"), 400),
    (head(LINE, JSON, b"content-length: -1\r\n"), 400),
    (head(LINE, JSON, b"content-length: 1\r\ncontent-length: 2\r\n"), 400),
    (head(LINE, JSON, b"content-length: 99000000\r\n") + OBJECT, 413),
    (head(LINE, JSON, b"transfer-encoding: chunked\r\n") + b"zz\r\n", 400),
    (head(LINE, b"a\x00b: c\r\n"), 400),
    (head(b"GET /v1/models\x00"), 400),
    (b"\x16\x03\x01\x02\x00\x01", 400),
]


@pytest.mark.parametrize(("request_bytes", "status"), REQUESTS)
def test_it_is_answered_and_is_no_fault(
    server: LiveServer, caplog: pytest.LogCaptureFixture, request_bytes: bytes, status: int
) -> None:
    got, body = exchange(server, request_bytes)
    assert got == status, body
    if status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(body) < 1000
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
