"""What a durable store must do. Every method is awaited from the event loop.

One ledger has sessions and stored responses: entries of a kind, each with the states after its last
turns. A response is an entry of one turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

Kind = Literal["session", "response"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")


class StoreError(Exception):
    """The store cannot be opened; one line says why."""


@dataclass(frozen=True)
class Entry:
    """What is known of a session or response besides its states. Times are Unix seconds."""

    kind: Kind
    id: str
    owner: str
    """Who made it; nobody else can see it."""

    created_at: float
    last_used_at: float
    turn: int = 0
    """Committed turns."""

    num_tokens: int = 0
    """Tokens of the conversation after them."""

    state_id: str | None = None
    """The state after the last turn; None before the first one, and where no state was kept."""

    num_checkpoints: int = 0
    """States kept, of the last turns."""

    ttl_s: float | None = None
    """Seconds without use after which it is erased; None: use does not matter."""

    expires_at: float | None = None
    """When it is erased; None: never."""

    parent_id: str | None = None
    """The session that it was forked from."""

    parent_turn: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    status: Status | None = None
    """Of a response: the one that the body shows."""

    body: str | None = None
    """The response object as JSON."""

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    def used(self, now: float) -> "Entry":
        """The entry when it is used now: a sliding lifetime begins anew. Time does not go back."""
        now = max(now, self.last_used_at)
        expires_at = self.expires_at if self.ttl_s is None else now + self.ttl_s
        return replace(self, last_used_at=now, expires_at=expires_at)


@dataclass(frozen=True)
class KeptAnswer:
    """The answer of a turn, kept for a client that sends the same request again."""

    key: str
    """Digest of the Idempotency-Key."""

    request: str
    """Digest of the request that came with it."""

    answer: str


@dataclass(frozen=True)
class NewState:
    """The state after an entry's present turn, to be kept with it."""

    id: str
    blob: bytes
    answer: KeptAnswer | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A turn whose state is kept."""

    turn: int
    num_tokens: int
    """Tokens of the conversation after it."""

    created_at: float
    num_bytes: int
    """Of the blob."""

    state_id: str


@dataclass(frozen=True)
class Usage:
    """What the store holds, of one owner or of all."""

    num_sessions: int = 0
    num_responses: int = 0
    num_states: int = 0
    num_bytes: int = 0
    """Of states, kept answers and bodies of responses."""


@dataclass(frozen=True)
class Header:
    """The beginning of the blob of an entry's present state."""

    number: int
    """Entries are numbered in the order in which they were made."""

    kind: Kind
    id: str
    beginning: bytes


@dataclass(frozen=True)
class StoreHealth:
    """Whether the store can keep what it is given."""

    num_bytes: int
    """Of its files."""

    free_bytes: int
    """Free on its disk."""

    unused_bytes: int
    """Free in its files: what was deleted, whose place the next states get."""

    disk_bytes: int
    """Of its disk, used or free."""

    fault: str | None = None
    """Why what it is given may be lost, if so."""


class Store(Protocol):
    """When a call that writes returns, what it wrote survives the process and the machine.

    Every call raises StorageFailed when the disk does; the store is then as before the call. Calls
    take effect in the order in which they were made, but those that write a large state later.
    Unless it is said otherwise a call takes a time that depends neither on the length of a
    conversation nor on the number of entries.
    """

    @property
    def total(self) -> Usage:
        """All that it holds."""

    def now(self) -> float:
        """Unix seconds by which entries live: it only grows, also over a restart and whatever the
        system's clock does."""

    async def health(self) -> StoreHealth:
        """Looks at the disk, now."""

    async def insert(self, entry: Entry, state: NewState | None = None) -> None:
        """Add an entry, with the state after its present turn if it has one."""

    async def advance(self, entry: Entry, state: NewState | None, keep: int) -> bool:
        """Write an entry as it is after its next turn, wholly or not at all; the last `keep` states
        stay. Without a state the turn stays as it is, and only a response ends.

        False, and nothing changes, if the entry is gone, at another turn, or finished.
        """

    async def rewrite_unfinished(
        self, rewrite: Callable[[Entry], Entry], but: frozenset[str]
    ) -> int:
        """Give all unfinished responses a new status and body, but for these ids; all or none.

        `rewrite` runs outside of the event loop. Returns how many there were.
        """

    async def get(self, kind: Kind, entry_id: str) -> Entry | None: ...

    async def list(
        self, kind: Kind, owner: str, limit: int, after: str | None, now: float
    ) -> list[Entry]:
        """The owner's that have not expired, newest first, beginning behind the entry `after`."""

    async def usage(self, owner: str) -> Usage: ...

    async def checkpoints(self, entry_id: str) -> Sequence[Checkpoint]:
        """Newest first."""

    async def find_answer(self, entry_id: str, key: str) -> KeptAnswer | None:
        """The answer kept under this digest of a key."""

    async def load(self, entry_id: str, turn: int) -> bytes | None:
        """The blob of the state after a turn."""

    async def headers(self, after: int, limit: int) -> Sequence[Header]:
        """Of the entries that have a state, in the order of their numbers, from behind `after`;
        each with its header as safetensors have one, or 64 KiB of it."""

    async def fork(self, source_id: str, entry: Entry) -> Entry | None:
        """Add an entry that begins with the source's state after the turn `entry.turn`.

        Returns it with its tokens and state; None if there is no such state.
        """

    async def rewind(self, entry_id: str, turn: int, now: float) -> Entry | None:
        """Go back to a turn and erase those after it; None if its state is not kept."""

    async def expired(self, now: float, limit: int) -> Sequence[Entry]:
        """Entries whose time is over, the longest over first."""

    async def delete(self, kind: Kind, entry_id: str) -> bool:
        """Erase the entry, its states and answers. False if there is no such entry.

        Also on a full disk, which is freed so. The one call that may have done half of its work
        when it raises: the entry is gone then, and its bytes are erased as soon as the disk
        permits; or, where the disk is full, only its oldest states are gone.
        """

    async def close(self) -> None: ...
