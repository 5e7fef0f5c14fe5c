"""Blobs round-trip, and damaged or forged ones are rejected."""

import hashlib
import json
import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.decoding.sampling import RecentTokens
from model.state import TensorSpec
from server.sessions.codec import (
    LARGEST,
    MAX_IMPORTED,
    MAX_MAGNITUDE,
    MAX_MESSAGE_CHARACTERS,
    BlobError,
    Codec,
    SessionState,
    read,
)

SPEC = (
    TensorSpec("m", (2, 3), "float32", -1e30),
    TensorSpec("Z", (2, 3), "float32", 0.0),
    TensorSpec("h", (1, 4), "float64", 0.0),
)
VOCAB = 1000
ARITHMETIC = "float32 x float32"
CODEC = Codec("0123456789abcdef" * 4, SPEC, VOCAB, ARITHMETIC)


def recent(*token_ids: int) -> bytes:
    tokens = RecentTokens()
    for token_id in token_ids:
        tokens.append(token_id, generated=token_id % 2 == 0)
    return tokens.to_bytes()


SESSION = SessionState(7, (5, 6), b"\xe2\x82", recent(3, 999, 6), bytes(range(80)), turn=3)
BLOB = CODEC.encode(SESSION)
HEADER_BYTES = int.from_bytes(BLOB[:8], "little")
HEADER: dict[str, Any] = json.loads(BLOB[8 : 8 + HEADER_BYTES])
DATA = BLOB[8 + HEADER_BYTES :]

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SESSIONS = st.integers(0, 10**12).flatmap(
    lambda position: st.builds(
        SessionState,
        position=st.just(position),
        pending=st.lists(st.integers(0, VOCAB - 1), max_size=min(position, 5)).map(tuple),
        undecoded=st.binary(max_size=3),
        recent=st.just(b"") | st.lists(st.integers(0, VOCAB - 1)).map(lambda ids: recent(*ids)),
        state=st.lists(FINITE, min_size=16, max_size=16).map(
            lambda v: np.array(v[:12], np.float32).tobytes() + np.array(v[12:]).tobytes()
        ),
        turn=st.integers(0, 10**9),
    )
)


def built(header: object, data: bytes = DATA) -> bytes:
    """A file with this header, which is JSON or already bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def forged(**changes: str | None) -> bytes:
    """SESSION's blob with modified metadata (None removes a key), and a matching checksum."""
    facts: dict[str, str | None] = HEADER["__metadata__"] | changes
    kept = {k: v for k, v in facts.items() if v is not None and k != "sha256"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    digest.update(SESSION.recent + SESSION.state)
    return built(HEADER | {"__metadata__": kept | {"sha256": digest.hexdigest()}})


def with_tensor(name: str, **changes: object) -> bytes:
    return built(HEADER | {name: HEADER.get(name, {}) | changes})


def refusal(blob: bytes) -> str:
    """The message of the BlobError; other errors fail the test."""
    with pytest.raises(BlobError) as caught:
        CODEC.decode(blob)
    return str(caught.value)


@given(SESSIONS)
def test_a_session_survives_encoding(session: SessionState) -> None:
    assert CODEC.decode(CODEC.encode(session)) == session


def test_the_arithmetic_is_that_of_the_network_that_computed_the_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = Codec(CODEC.fingerprint, SPEC, VOCAB, "int8 x int8")
    state = other.decode(BLOB)
    assert (state, state.arithmetic) == (SESSION, ARITHMETIC)
    assert other.decode(other.encode(state)).arithmetic == "int8 x int8"
    with caplog.at_level(logging.WARNING):
        CODEC.report_arithmetic("sess_1", state)
        assert not caplog.records
        other.report_arithmetic("sess_1", state)
    assert f"sess_1 was computed in {ARITHMETIC} and continues in int8 x int8" in caplog.text


def test_a_blob_of_before_does_not_say_its_arithmetic() -> None:
    before = forged(version="4", arithmetic=None)
    assert (CODEC.decode(before), CODEC.decode(before).arithmetic) == (SESSION, None)
    CODEC.report_arithmetic("sess_1", CODEC.decode(before))
    assert "checksum" in refusal(forged(version="4"))
    assert "damaged" in refusal(forged(arithmetic=None))


def test_the_size_is_the_models() -> None:
    assert CODEC.state_bytes == len(SESSION.state) == 2 * 24 + 32
    new = replace(SESSION, position=2)
    old = replace(SESSION, position=10**9, turn=10**6)
    assert abs(len(CODEC.encode(old)) - len(CODEC.encode(new))) <= 24
    assert len(BLOB) < CODEC.state_bytes + len(SESSION.recent) + 700
    assert len(CODEC.encode(replace(SESSION, position=9999, pending=(999,) * 9000))) < (
        CODEC.max_blob_bytes
    )


@pytest.mark.parametrize("size", [0, CODEC.state_bytes - 1, CODEC.state_bytes + 1])
def test_a_state_of_another_size_is_not_written(size: int) -> None:
    with pytest.raises(ValueError, match=f"80 bytes, not {size}"):
        CODEC.encode(replace(SESSION, state=bytes(size)))


def test_forging_can_succeed() -> None:
    """The tests below forge blobs with a matching checksum: this one shows that it matches."""
    assert CODEC.decode(forged()) == SESSION
    assert CODEC.decode(forged(position="8")) == replace(SESSION, position=8)


def test_a_cut_blob_is_refused() -> None:
    for size in range(len(BLOB)):
        refusal(BLOB[:size])
    refusal(BLOB + b"\0")


def test_every_flipped_bit_is_noticed() -> None:
    header, data = range(8 * (8 + HEADER_BYTES)), range(8 * (8 + HEADER_BYTES), 8 * len(BLOB))
    for bit in (*header, *data[::7]):
        flipped = bytearray(BLOB)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal(bytes(flipped))


@given(st.lists(st.tuples(st.integers(0, len(BLOB) - 1), st.binary(min_size=1, max_size=9))))
def test_overwritten_bytes_are_noticed(writes: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(BLOB)
    for start, values in writes:
        damaged[start : start + len(values)] = values
    if damaged == BLOB:
        assert CODEC.decode(bytes(damaged)) == SESSION
    else:
        refusal(bytes(damaged))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    refusal(noise)
    refusal(built(noise))


@pytest.mark.parametrize("length", [0, 1, len(BLOB), 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(length: int) -> None:
    refusal(length.to_bytes(8, "little") + BLOB[8:])


@pytest.mark.parametrize(
    "header",
    [b"", b"null", b"[]", b"1", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"],
)
def test_a_header_of_another_kind_is_refused(header: bytes) -> None:
    refusal(built(header))
    refusal(built(header, b""))


@pytest.mark.parametrize("facts", [None, {}, [], "x", 1, {"format": None}, {"format": ["x"]}])
def test_metadata_of_another_kind_are_refused(facts: object) -> None:
    refusal(built(HEADER | {"__metadata__": facts}))


def test_a_blob_without_metadata_is_refused() -> None:
    refusal(built({k: v for k, v in HEADER.items() if k != "__metadata__"}))


@pytest.mark.parametrize("key", sorted(HEADER["__metadata__"].keys() - {"sha256"}))
def test_every_fact_is_needed(key: str) -> None:
    assert key in refusal(forged(**{key: None})) or key == "fingerprint"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("position", v) for v in ("", "x", "-1", "+7", " 7", "7_0", "٧", "7.0", "1e3", "NaN")),
        ("position", "1"),  # less than what is pending
        ("position", "9" * 5000),
        *(("pending", v) for v in ("", "null", "1", "{}", '"56"', '["5", "6"]', "[5,6]", "[[5]]")),
        *(("pending", v) for v in ("[5.5, 6]", "[true, 6]", "[-1]", "[NaN]", "[1e999]", "[1e9]")),
        *(("pending", v) for v in ("[" * 100_000, "[5, 6", "[" + "9" * 5000 + "]")),
        *(("undecoded", v) for v in ("e", "zz", "E282", "e2 82", "é")),
        ("extra", "x"),
        *(("arithmetic", v) for v in ("", "fast", "int8", "int8 x int8 " * 1000)),
    ],
)
def test_forged_facts_are_refused(key: str, value: str) -> None:
    refusal(forged(**{key: value}))


def test_the_message_names_what_differs() -> None:
    assert "belongs to model 999999999999, this is 0123456789ab" in refusal(
        Codec("9" * 64, SPEC, VOCAB, ARITHMETIC).encode(SESSION)
    )
    for version in ("1", "3", "6"):
        logged = refusal(forged(version=version))
        assert f"version is '{version}', this program reads '5'" in logged
    assert "dtype is 'float16', this model has 'float64'" in refusal(forged(dtype="float16"))
    assert "format is 'gguf'" in refusal(forged(format="gguf"))
    no_checksum = HEADER["__metadata__"] | {"sha256": ""}
    assert "checksum" in refusal(built(HEADER | {"__metadata__": no_checksum}))
    assert "tensor m is ('int32', (2, 3))" in refusal(with_tensor("m", dtype="I32"))
    assert "tensor Z is ('float32', (3, 2))" in refusal(with_tensor("Z", shape=[3, 2]))
    renamed = {"H" if name == "h" else name: value for name, value in HEADER.items()}
    assert "tensor H is" in refusal(built(renamed))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(DATA), len(DATA)]}
    assert "tensor x is" in refusal(with_tensor("x", **empty))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F32", "shape": [2]},
        {"dtype": "BOOL"},
        {"shape": [2, 4]},
        {"dtype": "F8_E4M3"},
        {"dtype": "NONE"},
        {"dtype": None},
        {"shape": [-8]},
        {"data_offsets": [0, 8]},
    ],
)
def test_recent_tokens_of_another_kind_are_refused(changes: dict[str, object]) -> None:
    refusal(with_tensor("recent", **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pending": (5, VOCAB)}, "token id"),
        ({"recent": recent(5, VOCAB)}, "token id"),
        ({"recent": recent(VOCAB, 5)}, "token id"),
        ({"recent": bytes(4)}, "tensor recent"),
        ({"undecoded": b"\xf0\x9f\x98\x80"}, "pending"),
        ({"position": 1}, "position 1"),
        ({"position": 2**53}, "position"),
        ({"turn": -1}, "turn -1"),
        ({"turn": 2**53}, "turn"),
        ({"state": np.full(12, np.nan, np.float32).tobytes() + bytes(32)}, "tensor [mZ] .* finite"),
        ({"state": bytes(48) + np.full(4, -np.inf).tobytes()}, "tensor h .* finite"),
    ],
)
def test_what_no_server_would_have_written_is_refused(changes: dict[str, Any], named: str) -> None:
    """Though its checksum matches."""
    assert re.search(named, refusal(CODEC.encode(replace(SESSION, **changes))))


def test_the_checksum_of_another_models_blob_can_be_verified() -> None:
    fewer = Codec("f" * 64, SPEC[1:], VOCAB, ARITHMETIC)
    without_m = fewer.encode(replace(SESSION, state=SESSION.state[24:]))
    for blob in (BLOB, forged(fingerprint="x"), forged(extra="x"), without_m):
        assert CODEC.checksum_matches(*read(blob)) is True
    bare = built(HEADER | {"__metadata__": {}})
    for blob in (BLOB[:-1] + b"x", bare, BLOB.replace(b'"position":"7"', b'"position":"8"')):
        assert CODEC.checksum_matches(*read(blob)) is False
    assert fewer.checksum_matches(*read(BLOB)) is None


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F4", "C64", "F8_E5M2"])
@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [0, 2**31, 2**40], [2**63, 2], [0] * 100])
def test_impossible_shapes_are_refused(dtype: str, shape: list[int]) -> None:
    offsets = [len(DATA), len(DATA)]
    refusal(with_tensor("x", dtype=dtype, shape=shape, data_offsets=offsets))


def test_a_missing_tensor_is_refused() -> None:
    last = max(HEADER.keys() - {"__metadata__"}, key=lambda name: HEADER[name]["data_offsets"])
    cut = HEADER[last]["data_offsets"][0]
    assert last in refusal(built({k: v for k, v in HEADER.items() if k != last}, DATA[:cut]))


def test_a_long_header_does_not_make_a_long_message() -> None:
    endless = "x" * 1_000_000
    for blob in (forged(format=endless), with_tensor("m", dtype=endless), forged(pending=endless)):
        assert len(refusal(blob)) <= MAX_MESSAGE_CHARACTERS


def test_the_state_before_the_first_token_can_be_imported() -> None:
    fresh = np.full(12, [spec.initial for spec in SPEC[:2] for _ in range(6)], np.float32)
    session = SessionState(0, (), b"", b"", fresh.tobytes() + np.zeros(4).tobytes(), 0)
    assert CODEC.decode_foreign(CODEC.encode(session)).state == session.state


ABOVE = float(np.nextafter(np.float32(MAX_MAGNITUDE), np.float32(np.inf)))
EXTREMES = st.sampled_from([0.0, 1.0, 1e-38, 1e15, MAX_MAGNITUDE, ABOVE, 3e38])


@given(
    position=st.integers(0, 2 * MAX_IMPORTED) | st.sampled_from([0, MAX_IMPORTED, LARGEST - 1]),
    turn=st.integers(0, 2 * MAX_IMPORTED) | st.sampled_from([MAX_IMPORTED, LARGEST - 1]),
    numbers=st.lists(EXTREMES, min_size=16, max_size=16),
    sign=st.sampled_from([1, -1]),
    turns=st.integers(1, 10**9),
    tokens=st.integers(1, 10**15),
)
def test_any_number_of_turns_can_follow_what_was_imported(
    position: int, turn: int, numbers: list[float], sign: int, turns: int, tokens: int
) -> None:
    """However it was forged: states committed later can be read again."""
    values = sign * np.array(numbers)
    data = values[:12].astype(np.float32).tobytes() + values[12:].tobytes()
    forged = SessionState(position, (), b"", b"", data, turn)
    refused = max(position, turn) > MAX_IMPORTED or max(numbers) > MAX_MAGNITUDE
    if refused or max(position, turn) >= LARGEST:
        with pytest.raises(BlobError):
            CODEC.decode_foreign(CODEC.encode(forged))
        return
    session = CODEC.decode_foreign(CODEC.encode(forged))
    later = replace(session, position=position + tokens, turn=turn + turns)
    assert CODEC.decode(CODEC.encode(later)) == later
