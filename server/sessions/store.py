"""Interface of a durable store. All methods are awaited from the event loop.

A store has sessions and stored responses: entries of a kind, each with the states after its last
turns. A response is an entry of one turn.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

EntryKind = Literal["session", "response"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")


class StoreError(Exception):
    """The store cannot be opened; the message is one line."""


@dataclass(frozen=True)
class Entry:
    """A session or response without its states. Times are Unix seconds."""

    kind: EntryKind
    id: str
    owner: str
    """Its creator; invisible to others."""

    created_at: float
    last_used_at: float
    turn: int = 0
    """Committed turns."""

    num_tokens: int = 0
    """Tokens of the conversation so far."""

    state_id: str | None = None
    """The state after the last turn; None before the first turn, and if none is stored."""

    num_checkpoints: int = 0
    """Number of checkpoints."""

    ttl_s: float | None = None
    """Seconds without use after which it expires; None: no sliding lifetime."""

    expires_at: float | None = None
    """When it expires; None: never."""

    parent_id: str | None = None
    """The session that it was forked from."""

    parent_turn: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    status: Status | None = None
    """Status of a response, as in its body."""

    body: str | None = None
    """The response object as JSON."""

    @property
    def num_bytes(self) -> int:
        """Size of body and metadata, without states."""
        metadata = json.dumps(self.metadata) if self.metadata else ""
        return len((self.body or "").encode()) + len(metadata)

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    def used(self, now: float) -> "Entry":
        """The entry after use at `now`, with a renewed sliding lifetime. Time never goes back."""
        now = max(now, self.last_used_at)
        expires_at = self.expires_at if self.ttl_s is None else now + self.ttl_s
        return replace(self, last_used_at=now, expires_at=expires_at)


@dataclass(frozen=True)
class StoredAnswer:
    """A turn's answer, stored to be replayed for a repeated request."""

    key: str
    """Digest of the Idempotency-Key."""

    request: str
    """Digest of the request."""

    answer: str


@dataclass(frozen=True)
class NewState:
    """The state after an entry's current turn."""

    id: str
    blob: bytes
    answer: StoredAnswer | None = None


@dataclass(frozen=True)
class TurnCheckpoint:
    """A turn whose state is stored."""

    turn: int
    num_tokens: int
    """Tokens of the conversation after the turn."""

    created_at: float
    num_bytes: int
    """Size of the blob."""

    state_id: str


@dataclass(frozen=True)
class StoreUsage:
    """Usage of the store, of one owner or in total."""

    num_sessions: int = 0
    num_responses: int = 0
    num_states: int = 0
    num_bytes: int = 0
    """Size of states, stored answers, bodies of responses and metadata."""


@dataclass(frozen=True)
class Header:
    """The header of the blob of an entry's current state."""

    number: int
    """Sequence number, by creation."""

    kind: EntryKind
    id: str
    beginning: bytes


@dataclass(frozen=True)
class StoreHealth:
    """Health of the store."""

    num_bytes: int
    """Bytes of its files."""

    free_bytes: int
    """Free bytes on its disk."""

    unused_bytes: int
    """Free bytes in its files, which new states reuse."""

    disk_bytes: int
    """Size of its disk."""

    fault: str | None = None
    """Why data may be lost, if so."""


class Store(Protocol):
    """When a writing call returns, its data survives a crash of process and machine.

    Every call raises StorageFailed on disk errors and then changes nothing. Calls take effect in
    order, except that writes of large states may take effect later. Unless noted otherwise, the
    time of a call depends neither on the length of a conversation nor on the number of entries.
    """

    @property
    def total(self) -> StoreUsage:
        """Total usage."""

    def now(self) -> float:
        """Unix seconds by which entries expire; only grows, across restarts and changes of the
        system clock."""

    async def health(self) -> StoreHealth:
        """Check the disk."""

    async def insert(self, entry: Entry, state: NewState | None = None) -> None:
        """Add an entry, with the state after its current turn if it has one."""

    async def advance(self, entry: Entry, state: NewState | None, keep: int) -> bool:
        """Write an entry after its next turn, atomically, and retain the last `keep` states.
        Without a state the turn number stays, and only a response can end.

        False, without any change, if the entry is gone, at another turn, or finished.
        """

    async def rewrite_unfinished(
        self, rewrite: Callable[[Entry], Entry], but: frozenset[str]
    ) -> int:
        """Rewrite all unfinished responses except these ids, atomically.

        `rewrite` runs outside the event loop. Returns how many there were.
        """

    async def get(self, kind: EntryKind, entry_id: str) -> Entry | None: ...

    async def list(
        self, kind: EntryKind, owner: str, limit: int, after: str | None, now: float
    ) -> list[Entry]:
        """The owner's unexpired entries, newest first, after the entry `after`."""

    async def usage(self, owner: str) -> StoreUsage: ...

    async def checkpoints(self, entry_id: str) -> Sequence[TurnCheckpoint]:
        """Newest first."""

    async def find_answer(self, entry_id: str, key: str) -> StoredAnswer | None:
        """The answer stored under this digest of a key."""

    async def load(self, entry_id: str, turn: int) -> bytes | None:
        """The blob of the state after a turn."""

    async def headers(self, after: int, limit: int) -> Sequence[Header]:
        """Headers of entries with a state, in order, after number `after`; each has the blob's
        safetensors header, at most 64 KiB."""

    async def fork(self, source_id: str, entry: Entry) -> Entry | None:
        """Add an entry with the source's state after turn `entry.turn`.

        Returns it with its tokens and state; None if there is no such state.
        """

    async def rewind(self, entry_id: str, turn: int, now: float) -> Entry | None:
        """Go back to a turn and erase later ones; None if it has no checkpoint."""

    async def expired(self, now: float, limit: int) -> Sequence[Entry]:
        """Expired entries, oldest expiry first."""

    async def delete(self, kind: EntryKind, entry_id: str) -> bool:
        """Erase an entry with its states and answers. False if there is none.

        Works on a full disk, to free it. The only call that may be half done when it raises: either
        the entry is gone, and its bytes are erased as soon as the disk permits; or, on a full disk,
        only its oldest states are gone.
        """

    async def close(self) -> None: ...
