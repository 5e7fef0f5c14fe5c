"""What a durable store of sessions must do. Every method is awaited from the event loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class StoreError(Exception):
    """The store cannot be opened; one line says why."""


@dataclass(frozen=True)
class SessionRecord:
    """What is known of a session besides its state. Times are Unix seconds."""

    id: str
    created_at: float
    last_used_at: float
    owner: str = ""
    """Who made it; nobody else can see it."""

    turn: int = 0
    """Committed turns."""

    num_tokens: int = 0
    num_checkpoints: int = 0
    """States kept, of the last turns; turn 0 has none and needs none."""

    ttl_s: float | None = None
    """Seconds without use after which it is erased; None: never."""

    parent_id: str | None = None
    """The session that it was forked from."""

    parent_turn: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def expires_at(self) -> float | None:
        return None if self.ttl_s is None else self.last_used_at + self.ttl_s


@dataclass(frozen=True)
class CheckpointRecord:
    """A turn whose state is kept."""

    turn: int
    num_tokens: int
    """Tokens of the session after it."""

    created_at: float
    num_bytes: int
    """Of the blob."""


@dataclass(frozen=True)
class KeptAnswer:
    """The answer of a turn, kept for a client that asks for the same turn again."""

    key: str
    """Digest of the Idempotency-Key."""

    request: str
    """Digest of what was asked for with it."""

    answer: str


@dataclass(frozen=True)
class Turn:
    """What a commit adds to a session."""

    turn: int
    num_tokens: int
    created_at: float
    blob: bytes
    answer: KeptAnswer | None = None


@dataclass(frozen=True)
class Usage:
    """What the store holds, of one owner or of all."""

    num_sessions: int = 0
    num_states: int = 0
    num_bytes: int = 0
    """Of states and kept answers."""


class SessionStore(Protocol):
    """When a call that writes returns, what it wrote survives the process and the machine.

    Every call raises StorageFailed when the disk does; the store is then as before the call. Unless
    it is said otherwise a call takes a time that depends neither on a session's length nor on the
    number of sessions.
    """

    @property
    def total(self) -> Usage:
        """All that it holds."""

    async def create(self, record: SessionRecord, blob: bytes | None = None) -> None:
        """Add a session; with a blob, it has a checkpoint of its present turn."""

    async def get(self, session_id: str) -> SessionRecord | None: ...

    async def list(
        self, owner: str, limit: int, after: str | None, now: float
    ) -> list[SessionRecord]:
        """The owner's that have not expired, newest first, beginning behind the session `after`."""

    async def usage(self, owner: str) -> Usage: ...

    async def checkpoints(self, session_id: str) -> Sequence[CheckpointRecord]:
        """Newest first."""

    async def commit(self, session_id: str, turn: Turn, keep: int) -> None:
        """Make it the session's next turn, wholly or not at all; the last `keep` are kept."""

    async def find_answer(self, session_id: str, key: str) -> KeptAnswer | None:
        """The answer kept under this digest of a key."""

    async def load_blob(self, session_id: str, turn: int) -> bytes | None: ...

    async def fork(self, session_id: str, record: SessionRecord) -> SessionRecord | None:
        """Add `record` as a session that begins with a copy of the checkpoint of `record.turn`.

        Returns it with its number of tokens; None if there is no such checkpoint.
        """

    async def rewind(self, session_id: str, turn: int, used_at: float) -> SessionRecord | None:
        """Make this checkpoint the session's present and erase those after it.

        None if there is no such checkpoint.
        """

    async def expired(self, now: float, limit: int) -> Sequence[str]:
        """Ids of sessions that have not been used for as long as they may."""

    async def delete(self, session_id: str) -> bool:
        """Erase the session, its checkpoints and answers. False if there is no such session.

        The one call that may have done half of its work when it raises: the session is gone then,
        and its bytes are erased as soon as the disk permits.
        """

    async def close(self) -> None: ...
