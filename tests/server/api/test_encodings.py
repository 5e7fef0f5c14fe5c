"""Bodies with a Content-Encoding are decoded within the limit, or rejected with the right
status."""

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message

from server.api.encodings import CODINGS, decoded
from tests.server.api.calls import BODY

PLAIN = json.dumps(BODY).encode()


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": gzip.compress(PLAIN),
    "GZIP": gzip.compress(PLAIN),
    "x-gzip": gzip.compress(PLAIN[:20]) + gzip.compress(PLAIN[20:]),  # RFC 1952: in pieces
    "deflate": zlib.compress(PLAIN),
    "identity, deflate": raw_deflate(PLAIN),
}


def post(client: httpx.Client, coding: str, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    return client.post("/v1/completions", content=body, headers=headers)


@pytest.mark.parametrize("coding", PACKED)
def test_a_body_is_decoded(client: httpx.Client, coding: str) -> None:
    response = post(client, coding, PACKED[coding])
    assert response.status_code == 200, response.text
    plain = client.post(
        "/v1/completions", content=PLAIN, headers={"Content-Type": "application/json"}
    )
    assert response.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    "coding", ["br", "compress", "gzip, gzip", "zstd" if "zstd" not in CODINGS else "x"]
)
def test_an_unknown_coding_is_named(client: httpx.Client, coding: str) -> None:
    response = post(client, coding, PLAIN)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (415, "unsupported_content_encoding")
    assert coding in error["message"]
    assert "gzip" in response.headers["accept-encoding"]
    assert client.get("/v1/models", headers={"Content-Encoding": coding}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [PLAIN, gzip.compress(PLAIN)[:-9], gzip.compress(PLAIN) + b"more", gzip.compress(b"{")],
    ids=["plain", "cut", "with more behind it", "no JSON"],  # what gzip writes has the time in it
)
def test_a_body_that_is_not_what_it_says_is_refused(client: httpx.Client, body: bytes) -> None:
    response = post(client, "gzip", body)
    assert (response.status_code, response.json()["error"]["type"]) == (
        400,
        "invalid_request_error",
    )


def bombs() -> Iterator[tuple[str, bytes]]:
    huge = bytes(200_000_000)
    yield "gzip", gzip.compress(huge, 9)
    yield "deflate", zlib.compress(huge, 9)


def test_a_bomb_is_not_inflated(client: httpx.Client) -> None:
    for coding, bomb in bombs():
        response = post(client, coding, bomb[:50_000])  # the limit of this server is 100,000
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def read(coding: str, pieces: list[bytes], most: int) -> tuple[bytes, int]:
    """The body, and its largest message."""
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
    ]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Message:
        return messages.pop(0)

    receive_decoded = decoded(receive, Headers({"content-encoding": coding}), most)
    found = list[bytes]()
    while True:
        message = await receive_decoded()
        found.append(message["body"])
        if not message["more_body"]:
            return b"".join(found), max(map(len, found))


@given(st.binary(max_size=3000), st.integers(1, 500), st.sampled_from(["gzip", "deflate"]))
def test_any_pieces_of_any_body(body: bytes, size: int, coding: str) -> None:
    packed = (gzip if coding == "gzip" else zlib).compress(body)
    pieces = [packed[i : i + size] for i in range(0, len(packed), size)]
    assert asyncio.run(read(coding, pieces, len(body)))[0] == body
    if body:
        with pytest.raises(HTTPException) as refused:
            asyncio.run(read(coding, pieces, len(body) - 1))
        assert refused.value.status_code == 413


@pytest.mark.skipif("zstd" not in CODINGS, reason="no library for zstd")
def test_zstd() -> None:
    zstd = sys.modules.get("compression.zstd") or sys.modules["backports.zstd"]
    packed = zstd.compress(PLAIN)
    assert asyncio.run(read("zstd", [packed[:7], packed[7:], packed], 10_000))[0] == PLAIN * 2
    with pytest.raises(HTTPException):
        asyncio.run(read("zstd", [zstd.compress(bytes(10**7))], 1000))
