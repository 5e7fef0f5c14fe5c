"""Serialization of a session's state as a safetensors blob.

The tensors are the named tensors of the model's state and `recent`, the recent tokens for
penalties. The header's metadata has the format, the model's fingerprint, the dtype of its states,
the arithmetic that computed them, the turn, the position, pending tokens, and a checksum over
everything. Nothing in a blob is ever executed.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.decoding.sampling import RecentTokens
from model.state import DamagedState, TensorSpec, check_values, split_state

log = logging.getLogger(__name__)

FORMAT, VERSION = "latentd-session", "5"
BEFORE = "4"
"""The version without the arithmetic that computed the state."""

ARITHMETIC = re.compile(r"[a-z]+\d+ x [a-z]+\d+")
RECENT = "recent"
LARGEST = 1 << 53
MAX_IMPORTED = 1 << 52
"""Maximum turns and tokens of an imported session: no number of later turns can reach `LARGEST`,
beyond which a state could not be read any more."""

MAX_MAGNITUDE = 2.0**100
"""Maximum magnitude in an imported state, about 1.3e30: the same number in float32 and float64. No
network comes near it, and from about 1e37 on results would not be finite."""

MAX_MESSAGE_CHARACTERS = 300


class BlobError(ValueError):
    """The blob is damaged or of another model; the message names the difference."""

    def __init__(self, message: str) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARACTERS])  # headers may be long


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
    """Bytes of an incomplete character at the end of the text."""

    recent: bytes
    """Recent tokens, for penalties."""

    state: bytes
    """The model's state: its concatenated tensors."""

    turn: int = 0
    """The turn it was stored after; 0 if not yet known."""

    arithmetic: str | None = field(default=None, compare=False)
    """`Network.arithmetic` of the network that computed it, for decoded states that record it."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.state) + len(self.recent)


class Codec:
    """Encodes and decodes blobs of one model."""

    def __init__(
        self, fingerprint: str, tensors: Sequence[TensorSpec], vocab_sz: int, arithmetic: str
    ) -> None:
        """`arithmetic`: that of the network, recorded in encoded states."""
        self.fingerprint = fingerprint
        self.arithmetic = arithmetic
        self._tensors = tuple(tensors)
        self._vocab_sz = vocab_sz

    @property
    def state_bytes(self) -> int:
        """Size of a model state."""
        return sum(tensor.num_bytes for tensor in self._tensors)

    @property
    def typical_blob_bytes(self) -> int:
        """Upper bound of a blob's size with at most a thousand pending tokens."""
        return self.state_bytes + (1 << 13)

    @property
    def max_blob_bytes(self) -> int:
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
        return safetensors.numpy.save(arrays, self._facts(session, self.arithmetic))

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
                arithmetic=None if facts["version"] == BEFORE else facts["arithmetic"],
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DamagedBlob(f"the header is damaged: {error}") from error
        if facts != self._facts(session, session.arithmetic):
            raise DamagedBlob("the checksum does not match: the blob is damaged")
        self._check_values(session, arrays)
        return session

    def decode_foreign(self, blob: bytes) -> SessionState:
        """`decode` for untrusted blobs: the result can have any number of turns, whose states can
        be exported and imported again. Raises BlobError."""
        session = self.decode(blob)
        if max(session.turn, session.position) > MAX_IMPORTED:
            raise BlobError(
                f"turn {session.turn} at position {session.position}: too large for a session"
            )
        self.check_foreign(session)
        return session

    def check_foreign(self, session: SessionState) -> None:
        """Raises BlobError for numbers too large for the state of any network."""
        largest = self.check(session)
        if largest > MAX_MAGNITUDE:
            raise BlobError(f"it has numbers up to {largest:.3g}, more than {MAX_MAGNITUDE:g}")

    def report_arithmetic(self, entry_id: str, session: SessionState) -> None:
        """Log if a state was computed in another arithmetic than this server's."""
        if session.arithmetic not in {None, self.arithmetic}:
            log.warning(
                "%s was computed in %s and continues in %s: results will not be bit-identical",
                *(entry_id, session.arithmetic, self.arithmetic),
            )

    def checksum_matches(
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

    def _facts(self, session: SessionState, arithmetic: str | None) -> dict[str, str]:
        """The header's metadata, in its only spelling."""
        facts = {
            "format": FORMAT,
            "version": BEFORE if arithmetic is None else VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self._dtype,
            "turn": str(session.turn),
            "position": str(session.position),
            "pending": json.dumps(session.pending),
            "undecoded": session.undecoded.hex(),
        }
        if arithmetic is not None:
            facts["arithmetic"] = arithmetic
        return facts | {"sha256": _checksum(facts, session.recent, session.state)}

    @property
    def _dtype(self) -> str:
        """Dtype of the largest tensor."""
        return max(self._tensors, key=lambda tensor: tensor.num_bytes).dtype

    def _check_header(self, facts: Mapping[str, str]) -> None:
        if facts.get("format") != FORMAT:
            raise BlobError(f"format is {facts.get('format')!r}, not {FORMAT!r}")
        if facts.get("version") not in {BEFORE, VERSION}:
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
            raise BlobError(f"turn {session.turn} at position {session.position} is not possible")
        if session.arithmetic is not None and not ARITHMETIC.fullmatch(session.arithmetic):
            raise BlobError(f"arithmetic {session.arithmetic!r} is not possible")
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


def is_exported(blob: bytes) -> bool:
    """Whether the header of a safetensors blob says that it is an exported session, however whole;
    so does one that cannot be read."""
    try:
        return _metadata(blob).get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError):
        return True


def read(blob: bytes) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Header and tensors of any safetensors blob. Raises BlobError."""
    try:
        return _metadata(blob), safetensors.numpy.load(blob)
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedBlob(f"not a complete safetensors blob: {error}") from error


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
