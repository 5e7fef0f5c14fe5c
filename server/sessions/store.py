"""What a durable store of sessions and responses must do. Every method is awaited from the event
loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
UNFINISHED: tuple[ResponseStatus, ...] = ("queued", "in_progress")


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
class ResponseRecord:
    """What is known of a response besides its state. Times are Unix seconds."""

    id: str
    owner: str
    """Who asked for it; nobody else can see it."""

    created_at: float
    expires_at: float | None
    """When it is erased; None: never."""

    status: ResponseStatus
    """The one that the body tells."""

    body: str
    """The response object as JSON."""

    num_tokens: int = 0
    """Tokens of the conversation after it, if it has a state."""

    has_state: bool = False
    """Whether the state after it is kept, from which others can go on."""

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class Usage:
    """What the store holds, of one owner or of all."""

    num_sessions: int = 0
    num_states: int = 0
    """After turns of sessions and after responses."""

    num_bytes: int = 0
    """Of states, kept answers and bodies of responses."""

    num_responses: int = 0


class ResponseStore(Protocol):
    """When a call that writes returns, what it wrote survives the process and the machine.

    Every call raises StorageFailed when the disk does; the store is then as before the call. What
    responses hold is in the same accounts as what sessions hold. Calls take effect in the order in
    which they were made.
    """

    async def insert(self, record: ResponseRecord, blob: bytes | None = None) -> None:
        """Add a response, with the blob of the state after it if it has one."""

    async def finish(self, record: ResponseRecord, blob: bytes | None = None) -> bool:
        """Give an unfinished response its status, body, tokens and state.

        False, and nothing changes, if there is no such response or it is finished.
        """

    async def rewrite_unfinished(
        self, rewrite: Callable[[ResponseRecord], ResponseRecord], but: frozenset[str]
    ) -> int:
        """Give all unfinished ones a new status and body, but for these ids; all or none.

        `rewrite` runs outside of the event loop. Returns how many there were.
        """

    async def get(self, response_id: str) -> ResponseRecord | None: ...

    async def load_blob(self, response_id: str) -> bytes | None: ...

    async def copy_to_session(
        self, response_id: str, record: SessionRecord
    ) -> SessionRecord | None:
        """Add `record` as a session whose checkpoint of `record.turn` is a copy of the state.

        Returns it with its number of tokens; None if there is no such state.
        """

    async def expired(self, now: float, limit: int) -> Sequence[str]:
        """Ids of responses whose time is over."""

    async def delete(self, response_id: str) -> bool:
        """Erase the response and its state. False if there is no such response.

        As with sessions it may have done half of its work when it raises: the response is gone
        then, and its bytes are erased as soon as the disk permits.
        """


class SessionStore(Protocol):
    """When a call that writes returns, what it wrote survives the process and the machine.

    Every call raises StorageFailed when the disk does; the store is then as before the call. Unless
    it is said otherwise a call takes a time that depends neither on a session's length nor on the
    number of sessions.
    """

    @property
    def total(self) -> Usage:
        """All that it holds, responses included."""

    @property
    def responses(self) -> ResponseStore:
        """The stored responses, in the same place."""

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
