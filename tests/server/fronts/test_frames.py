"""Frames survive transmission, however the bytes are split."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.fronts.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    REQUEST_WINDOW_BYTES,
    Frame,
    FrameError,
    FrameKind,
    FrameReader,
    first_window,
    header,
    pack_credit,
    pack_scope,
    pack_start,
    unpack_credit,
    unpack_scope,
    unpack_start,
)

FRAMES = st.lists(
    st.builds(Frame, st.sampled_from(FrameKind), st.integers(0, 2**32 - 1), st.binary(max_size=300))
)
LATIN = st.binary(max_size=20)
HEADERS = st.lists(st.tuples(LATIN, LATIN), max_size=5)
ADDRESS = st.none() | st.tuples(st.text(max_size=9), st.integers(0, 65535))
SCOPES = st.fixed_dictionaries(
    {
        "type": st.just("http"),
        "asgi": st.just({"version": "3.0", "spec_version": "2.3"}),
        "http_version": st.sampled_from(["1.0", "1.1"]),
        "server": ADDRESS,
        "client": ADDRESS,
        "scheme": st.sampled_from(["http", "https"]),
        "root_path": st.just(""),
        "method": st.text(max_size=9),
        "path": st.text(max_size=20),
        "raw_path": LATIN,
        "query_string": LATIN,
        "headers": HEADERS,
        "state": st.just({}),
    }
)


def packed(frames: list[Frame]) -> bytes:
    return b"".join(
        header(frame.kind, frame.request, len(frame.payload)) + frame.payload for frame in frames
    )


@given(FRAMES, st.lists(st.integers(0, 5000)))
def test_any_cut_gives_the_same_frames(frames: list[Frame], cuts: list[int]) -> None:
    data = packed(frames)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    reader = FrameReader()
    read = [
        frame for start, end in itertools.pairwise(places) for frame in reader.feed(data[start:end])
    ]
    assert read == frames


@given(FRAMES.filter(bool))
def test_a_frame_comes_with_its_last_byte(frames: list[Frame]) -> None:
    data, reader = packed(frames), FrameReader()
    assert list(reader.feed(data[:-1])) == frames[:-1]
    assert list(reader.feed(data[-1:])) == frames[-1:]


@pytest.mark.parametrize(
    "data",
    [b"\x00" * HEADER_BYTES, b"HTTP/1.1 200 OK", header(FrameKind.DATA, 1, MAX_PAYLOAD_BYTES + 1)],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader().feed(data))


@given(SCOPES)
def test_a_scope_arrives_unchanged(scope: dict[str, Any]) -> None:
    assert unpack_scope(pack_scope(scope)) == scope


@given(st.integers(100, 599), HEADERS)
def test_a_head_arrives_unchanged(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    message = {"type": "http.response.start", "status": status, "headers": headers}
    assert unpack_start(pack_start(message)) == message


@given(st.integers(0, 2**32 - 1))
def test_a_credit_arrives_unchanged(num_bytes: int) -> None:
    assert unpack_credit(pack_credit(num_bytes)) == num_bytes


def test_a_client_that_waits_to_be_asked_sends_no_body_yet() -> None:
    assert first_window({"headers": [(b"expect", b"100-Continue")]}) == 0
    assert first_window({"headers": [(b"expect", b"nothing")]}) == REQUEST_WINDOW_BYTES
