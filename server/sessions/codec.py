"""A session's state as one blob: a safetensors file that says what it belongs to.

The tensors are the named tensors of the model's state and `recent`, the tokens that penalties look
back on. The header's metadata tell the format, the model's fingerprint, the position, what is
pending, and a checksum over all of it. Nothing in it is ever executed.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.state import TensorSpec

FORMAT, VERSION = "latentd-session", "1"
RECENT = "recent"
LONGEST_MESSAGE = 300


class BlobError(ValueError):
    """The blob is damaged or not for this model; the message names what differs."""

    def __init__(self, message: str) -> None:
        super().__init__(message[:LONGEST_MESSAGE])  # a header can be as long as its sender likes


@dataclass(frozen=True)
class SessionState:
    """All that a session continues from."""

    position: int
    """Tokens of the session, those pending included."""

    pending: tuple[int, ...]
    """The last of them, which the state has not read yet."""

    undecoded: bytes
    """Bytes of the text that began a character."""

    recent: bytes
    """What the penalties look back on."""

    state: bytes
    """The model's state: the bytes of a row, its tensors one after another."""

    @property
    def num_bytes(self) -> int:
        """Memory that holding it takes."""
        return len(self.state) + len(self.recent)


class Codec:
    """Blobs of one model."""

    def __init__(self, fingerprint: str, tensors: Sequence[TensorSpec]) -> None:
        self.fingerprint = fingerprint
        self._tensors = tuple(tensors)

    @property
    def state_bytes(self) -> int:
        """Size of a model state."""
        return sum(tensor.num_bytes for tensor in self._tensors)

    def encode(self, session: SessionState) -> bytes:
        """The blob; its size depends on the model only, but for a few digits in the header.

        Raises ValueError when the state does not have the size of this model's.
        """
        if len(session.state) != self.state_bytes:
            raise ValueError(
                f"a state of this model has {self.state_bytes} bytes, not {len(session.state)}"
            )
        arrays: dict[str, NDArray[np.generic]] = {RECENT: np.frombuffer(session.recent, np.uint8)}
        start = 0
        for tensor in self._tensors:
            count = math.prod(tensor.shape)
            values = np.frombuffer(session.state, np.dtype(tensor.dtype), count, start)
            arrays[tensor.name] = values.reshape(tensor.shape)
            start += tensor.num_bytes
        return safetensors.numpy.save(arrays, self._facts(session))

    def decode(self, blob: bytes) -> SessionState:
        """Raises BlobError for anything but an undamaged blob of this model."""
        try:
            arrays = safetensors.numpy.load(blob)
            facts = _metadata(blob)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BlobError(f"not a whole safetensors blob: {error}") from error
        self._check_header(facts)
        self._check_tensors(arrays)
        try:
            session = SessionState(
                position=int(facts["position"]),
                pending=tuple(int(token_id) for token_id in json.loads(facts["pending"])),
                undecoded=bytes.fromhex(facts["undecoded"]),
                recent=arrays[RECENT].tobytes(),
                state=b"".join(arrays[tensor.name].tobytes() for tensor in self._tensors),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BlobError(f"the header is damaged: {error}") from error
        if len(session.pending) > session.position or min(session.pending, default=0) < 0:
            raise BlobError(f"position {session.position} and its pending tokens cannot be")
        if facts != self._facts(session):
            raise BlobError("the checksum does not match: the blob is damaged")
        return session

    def _facts(self, session: SessionState) -> dict[str, str]:
        """The header's metadata; there is one way to write it."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "position": str(session.position),
            "pending": json.dumps(session.pending),
            "undecoded": session.undecoded.hex(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(session.recent)
        digest.update(session.state)
        return facts | {"sha256": digest.hexdigest()}

    def _check_header(self, facts: Mapping[str, str]) -> None:
        if facts.get("format") != FORMAT:
            raise BlobError(f"format is {facts.get('format')!r}, not {FORMAT!r}")
        if facts.get("version") != VERSION:
            raise BlobError(f"version is {facts.get('version')!r}, this program reads {VERSION!r}")
        if facts.get("fingerprint") != self.fingerprint:
            theirs = str(facts.get("fingerprint"))[:12]
            raise BlobError(f"it belongs to model {theirs}, this is {self.fingerprint[:12]}")

    def _check_tensors(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        found = {name: (str(values.dtype), values.shape) for name, values in arrays.items()}
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._tensors}
        expected[RECENT] = ("uint8", (arrays[RECENT].size if RECENT in arrays else 0,))
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise BlobError(
                    f"tensor {name} is {found.get(name)}, the model has {expected.get(name)}"
                )


def _metadata(blob: bytes) -> dict[str, str]:
    """The header's metadata, which the library does not return for a blob in memory."""
    size = int.from_bytes(blob[:8], "little")
    facts: dict[str, str] | None = json.loads(blob[8 : 8 + size]).get("__metadata__")
    return facts or {}
