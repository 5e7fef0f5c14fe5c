"""A session's state at rest in less than a third of its bytes, with a bound on what that changes.

In the letters of `model.attention`, a head with log values answers a query with

    log y_v = log sum_j e_j S_jv - log sum_j e_j Z_j + n_v.

m, Z and n are kept exactly, so only the first sum changes. Its terms are not negative: where each
S_jv is off by a factor within exp(±b), so is the sum, whatever the query. Here log S_jv is rounded
to a lattice of step `STEP`: log y moves by at most half of that, and `BOUND` leaves room for
float32. This is per layer, and for each time that a state is packed.

The lattice of log(Z_j / S_jv) is shifted by an amount that looks random and that Z tells. To pack
again what was unpacked changes nothing, as Z is the same; after a turn the lattice is another one.
On a fixed lattice a session that rests after every turn would return to the same points, and forget
what a turn adds where that is less than half a step. So errors add up like those of coins.

Lattice points of the default checkpoint's states need 9 bits, not the 11 of their range: the lowest
4 are kept as they are, the others in a Huffman code, in a buffer of fixed size; a state whose code
is longer is not packed. h becomes float32, an error of 6e-8 of its value, and `z_low` and `s_low`,
at most half of the last place of each sum, become zero.
"""

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.attention import EMPTY
from model.state import StateSpec, TensorSpec, split_state

BOUND = 0.02
"""log y of every head moves by at most this, in each layer, for any query.

At three quarters of this, states of the default checkpoint would have next to no bytes to spare.
"""

STEP = 0.0399
"""Of the lattice. The rest of `BOUND` is for the rounding of logarithms in float32."""

FINE = 16
"""Lattice points of one coarse code."""

NOTHING = 255 * FINE
"""The code of a sum that is zero; all others are below."""

ROUNDING = 1e-3
"""Steps by which rounding may have put a sum above Z, which it never is otherwise."""

SMALLEST = 2.0**-125
"""Smaller sums are not packed: float32 has fewer digits for them."""

UNSET = -(2**15)
"""Stands for a running maximum before the first token."""

GOLDEN = 2654435769
"""2^32 over the golden ratio: its multiples are spread evenly modulo 2^32 (Knuth, 6.4)."""

Arrays = dict[str, NDArray[Any]]


def compact_form(spec: StateSpec) -> "CompactForm | None":
    """The compact form of these states; None if they have none."""
    try:
        return CompactForm(spec)
    except ValueError:
        return None


class CompactForm:
    """Packs and unpacks the states of one network."""

    def __init__(self, spec: StateSpec) -> None:
        """Raises ValueError for a network whose states have no compact form."""
        shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
        if "n" not in shapes:
            raise ValueError("no compact form for linear values: sums of both signs have no bound")
        if "last" in shapes:
            raise ValueError("no compact form for the last inputs that token_shift has")
        if any(t.dtype != "float32" for t in spec.tensors if t.name in ("m", "z", "s", "n")):
            raise ValueError("no compact form for sums that are not float32")
        self._spec = spec
        self._sums = shapes["s"]
        self._num_keys = math.prod(shapes["m"])
        self._num_maxima = self._num_keys + math.prod(shapes["n"])
        self._num_sums = math.prod(shapes["s"])
        self._num_codes = self._num_sums + self._num_sums % 2
        # A sum's coarse code has at most 4.4 bits in states of the default checkpoint, a maximum 7.
        room = self._num_codes * 19 // 32 + self._num_maxima + 256
        self.tensors = (
            TensorSpec("h", shapes["h"], "float32", 0.0),
            TensorSpec("z", shapes["z"], "float32", 0.0),
            TensorSpec("fine", (1, self._num_codes // 2), "uint8", 0),
            TensorSpec("deflated", (1, room), "uint8", 0),
        )

    @property
    def num_bytes(self) -> int:
        """Of every packed state."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def pack(self, state: bytes) -> bytes | None:
        """The compact form of a row's bytes, or None for a state that it cannot hold.

        Those are states whose code is longer than the bytes there are for it, and what only a
        network out of the ordinary makes: maxima beyond 32,767, sums below `SMALLEST`, infinities.
        Raises ValueError when the length is not that of this network's states.
        """
        values = split_state(self._spec.tensors, state)
        with np.errstate(over="ignore"):
            h = values["h"].astype("<f4")
        maxima = _whole(np.concatenate([values["m"].ravel(), values["n"].ravel()]))
        if maxima is None or not np.isfinite(h).all():
            return None
        codes = np.zeros(self._num_codes, np.uint16)
        layers = codes[: self._num_sums].reshape(self._sums)
        for z, s, points in zip(values["z"], values["s"], layers, strict=True):
            if not _to_lattice(z, s, points):
                return None
        coarse = (codes // FINE).astype(np.uint8)
        one, other = np.split((codes & (FINE - 1)).astype(np.uint8), 2)
        deflated = _deflate(coarse, maxima.view(np.uint8).reshape(-1, 2).T)
        room = self.tensors[-1].num_bytes
        if len(deflated) > room:
            return None
        kept = (h, values["z"], one | other << 4)
        return b"".join(part.tobytes() for part in kept) + deflated.ljust(room, b"\0")

    def unpack(self, packed: bytes) -> bytes:
        """The bytes of a row again. Raises ValueError for bytes that `pack` does not make."""
        values = split_state(self.tensors, packed)
        inflated = _inflate(values["deflated"], self._num_codes + 2 * self._num_maxima)
        codes = inflated[: self._num_codes].astype(np.uint16) * FINE
        one, other = np.split(codes, 2)
        one |= values["fine"][0] & (FINE - 1)
        other |= values["fine"][0] >> 4
        layers = codes[: self._num_sums].reshape(self._sums)
        sums = [_from_lattice(*layer) for layer in zip(values["z"], layers, strict=True)]
        maxima = inflated[self._num_codes :].reshape(2, -1).T.copy().view("<i2").astype("<f4")
        maxima[maxima == UNSET] = EMPTY
        found: Arrays = {
            "h": values["h"].astype("<f8"),
            "m": maxima[: self._num_keys],
            "z": values["z"],
            "s": np.stack(sums),
            "n": maxima[self._num_keys :],
        }
        if not np.isfinite(found["s"]).all():
            raise ValueError("a compact state with sums that are not finite")
        return b"".join(
            found[tensor.name].tobytes() if tensor.name in found else bytes(tensor.num_bytes)
            for tensor in self._spec.tensors
        )


def _whole(maxima: NDArray[np.float32]) -> NDArray[np.int16] | None:
    """Running maxima as int16, or None if one is none."""
    unset = maxima == np.float32(EMPTY)
    if not (unset | (maxima == np.rint(maxima)) & (np.abs(maxima) < -UNSET)).all():
        return None
    return np.where(unset, UNSET, maxima).astype("<i2")


def _to_lattice(z: NDArray[np.float32], s: NDArray[np.float32], points: NDArray[np.uint16]) -> bool:
    """Fill in the lattice points of a layer's sums; False where there is none for one of them.

    One layer at a time, so that it stays in the cache: z `[heads, d_k]`, s and points
    `[heads, d_k, d_v]`.
    """
    nothing = s == 0
    if not (nothing | (s >= SMALLEST)).all():
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(z)[..., None] - np.log(s)
    found *= np.float32(1 / STEP)
    found[nothing] = 0
    if not (found.min() > -ROUNDING and found.max() < NOTHING - 1):
        return False
    found += _shift(z, s.shape[-1])
    np.rint(found, out=found)
    found[nothing] = NOTHING
    points[:] = found
    return True


def _from_lattice(z: NDArray[np.float32], points: NDArray[np.uint16]) -> NDArray[np.float32]:
    """A layer's sums, each within a factor of exp(±`BOUND`) of what it was, and at most Z."""
    s = _shift(z, points.shape[-1])
    s -= points
    np.minimum(s, 0, out=s)
    s *= np.float32(STEP)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        s += np.log(z)[..., None]
        np.exp(s, out=s)
    s[points >= NOTHING] = 0
    return s


def _shift(z: NDArray[np.float32], d_val: int) -> NDArray[np.float32]:
    """Where each sum's lattice lies, in steps from 0 to 1: a hash of Z's bits and the channel.

    It is an odd number of 512ths: a sum equal to Z is never halfway between two points.
    z `[heads, d_k]` -> `[heads, d_k, d_v]`.
    """
    odd = np.arange(1, 2 * d_val, 2, dtype=np.uint32)
    bits: NDArray[np.uint32] = z.view("<u4")[..., None] * (odd * np.uint32(GOLDEN))
    return ((bits >> 24).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-8)


def _deflate(*parts: NDArray[Any]) -> bytes:
    """The bytes in a Huffman code, RFC 1950."""
    code = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join(code.compress(part.tobytes()) for part in parts) + code.flush()


def _inflate(deflated: NDArray[np.uint8], num_bytes: int) -> NDArray[np.uint8]:
    """So many bytes, and nothing but zeros behind their code. Raises ValueError."""
    code = zlib.decompressobj()
    try:
        inflated = code.decompress(deflated.tobytes(), num_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"a compact state that is damaged: {error}") from error
    if not code.eof or len(inflated) != num_bytes or code.unused_data.strip(b"\0"):
        raise ValueError("a compact state that is damaged: its code has another length")
    return np.frombuffer(inflated, np.uint8)
