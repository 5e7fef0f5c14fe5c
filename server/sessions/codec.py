"""Serialization of a session's state as a safetensors blob.

The tensors are those of the model's state and `recent`, the tokens that penalties apply to. The
metadata has the format, the model's fingerprint, the dtype of its states, the turn, the position,
pending tokens, and a checksum over everything. Nothing in a blob is ever executed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.decoding.sampling import RecentTokens
from model.state import DamagedState, TensorSpec, check_values, split_state

FORMAT, VERSION = "latentd-session", "4"
RECENT = "recent"
LARGEST = 1 << 53
LONGEST_MESSAGE = 300


class BlobError(ValueError):
    """The blob is damaged or of another model; the message names the difference."""

    def __init__(self, message: str) -> None:
        super().__init__(message[:LONGEST_MESSAGE])  # headers may be long


class DamagedBlob(BlobError):
    """The blob is of this model but damaged, or its state is."""


@dataclass(frozen=True)
class SessionState:
    """Everything that a session continues from."""

    position: int
    """Tokens of the session, including pending ones."""

    pending: tuple[int, ...]
    """The last tokens, not yet part of the state."""

    undecoded: bytes
    """Bytes of an incomplete character."""

    recent: bytes
    """Recent tokens, for penalties."""

    state: bytes
    """The model's state: its concatenated tensors."""

    turn: int = 0
    """The turn that it follows; 0 if not yet known."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.state) + len(self.recent)


class Codec:
    """Encodes and decodes blobs of one model."""

    def __init__(self, fingerprint: str, tensors: Sequence[TensorSpec], vocab_sz: int) -> None:
        self.fingerprint = fingerprint
        self._tensors = tuple(tensors)
        self._vocab_sz = vocab_sz

    @property
    def state_bytes(self) -> int:
        """Size of a model state."""
        return sum(tensor.num_bytes for tensor in self._tensors)

    @property
    def usual_blob_bytes(self) -> int:
        """Upper bound of a blob's size with at most a thousand pending tokens."""
        return self.state_bytes + (1 << 13)

    @property
    def most_blob_bytes(self) -> int:
        """Upper bound of a blob's size, even with thousands of pending tokens."""
        return self.state_bytes + (1 << 16)

    def check(self, session: SessionState) -> float:
        """Check a state. Returns its largest absolute value. Raises DamagedState, and ValueError
        for a wrong size."""
        return check_values(self._tensors, split_state(self._tensors, session.state))

    def encode(self, session: SessionState) -> bytes:
        """Encode a state; the size depends on the model, except for a few digits in the header.

        Raises ValueError for a state of a wrong size.
        """
        arrays = split_state(self._tensors, session.state)
        arrays[RECENT] = np.frombuffer(session.recent, np.uint8)
        return safetensors.numpy.save(arrays, self._facts(session))

    def decode(self, blob: bytes) -> SessionState:
        """Decode a blob. Raises BlobError unless it is an intact blob of this model."""
        facts, arrays = read(blob)
        self._check_header(facts)
        self._check_tensors(arrays)
        try:
            session = SessionState(
                position=int(facts["position"]),
                pending=tuple(int(token_id) for token_id in json.loads(facts["pending"])),
                undecoded=bytes.fromhex(facts["undecoded"]),
                recent=arrays[RECENT].tobytes(),
                state=b"".join(arrays[tensor.name].tobytes() for tensor in self._tensors),
                turn=int(facts["turn"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DamagedBlob(f"the header is damaged: {error}") from error
        if facts != self._facts(session):
            raise DamagedBlob("the checksum does not match: the blob is damaged")
        self._check_values(session, arrays)
        return session

    def checksum_fits(
        self, facts: Mapping[str, str], arrays: Mapping[str, NDArray[np.generic]]
    ) -> bool | None:
        """Whether the checksum of a blob, perhaps of another model, matches.

        None if its tensors differ from this model's, since their order is then unknown.
        """
        names = [tensor.name for tensor in self._tensors]
        if not arrays.keys() <= {*names, RECENT} or RECENT not in arrays:
            return None
        state = b"".join(arrays[name].tobytes() for name in names if name in arrays)
        kept = {name: value for name, value in facts.items() if name != "sha256"}
        return facts.get("sha256") == _checksum(kept, arrays[RECENT].tobytes(), state)

    def _facts(self, session: SessionState) -> dict[str, str]:
        """The header's metadata, in canonical form."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self._dtype,
            "turn": str(session.turn),
            "position": str(session.position),
            "pending": json.dumps(session.pending),
            "undecoded": session.undecoded.hex(),
        }
        return facts | {"sha256": _checksum(facts, session.recent, session.state)}

    @property
    def _dtype(self) -> str:
        """Dtype of the largest tensor."""
        return max(self._tensors, key=lambda tensor: tensor.num_bytes).dtype

    def _check_header(self, facts: Mapping[str, str]) -> None:
        if facts.get("format") != FORMAT:
            raise BlobError(f"format is {facts.get('format')!r}, not {FORMAT!r}")
        if facts.get("version") != VERSION:
            raise BlobError(f"version is {facts.get('version')!r}, this program reads {VERSION!r}")
        if facts.get("fingerprint") != self.fingerprint:
            theirs = str(facts.get("fingerprint"))[:12]
            raise BlobError(f"it belongs to model {theirs}, this is {self.fingerprint[:12]}")
        if facts.get("dtype") != self._dtype:
            raise BlobError(f"dtype is {facts.get('dtype')!r}, this model has {self._dtype!r}")

    def _check_tensors(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        found = {name: (str(values.dtype), values.shape) for name, values in arrays.items()}
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._tensors}
        expected[RECENT] = ("uint8", (arrays[RECENT].size if RECENT in arrays else 0,))
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise BlobError(
                    f"tensor {name} is {found.get(name)}, the model has {expected.get(name)}"
                )

    def _check_values(
        self, session: SessionState, arrays: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Validate values: a matching checksum does not prove that a server wrote the blob."""
        if not 0 <= session.turn < LARGEST or not 0 <= session.position < LARGEST:
            raise BlobError(f"turn {session.turn} at position {session.position} is impossible")
        if len(session.pending) > session.position or len(session.undecoded) > 3:
            raise BlobError(f"the pending tokens do not fit position {session.position}")
        try:
            recent = RecentTokens.from_bytes(session.recent).seen()
        except ValueError as error:
            raise BlobError(f"tensor {RECENT}: {error}") from error
        ids = (*session.pending, *recent.tolist())
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_sz:
            raise BlobError(f"a token id is not below {self._vocab_sz}")
        try:
            check_values(self._tensors, arrays)
        except DamagedState as error:
            raise DamagedBlob(str(error)) from error


def read(blob: bytes) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Header and tensors of any safetensors blob. Raises BlobError."""
    try:
        return _metadata(blob), safetensors.numpy.load(blob)
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedBlob(f"not a whole safetensors blob: {error}") from error


def _checksum(facts: Mapping[str, str], recent: bytes, state: bytes) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(recent)
    digest.update(state)
    return digest.hexdigest()


def _metadata(blob: bytes) -> dict[str, str]:
    """The header's metadata, which the library does not return for a blob in memory."""
    size = int.from_bytes(blob[:8], "little")
    facts: dict[str, str] | None = json.loads(blob[8 : 8 + size]).get("__metadata__")
    return facts or {}
