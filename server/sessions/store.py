"""What a durable store of sessions must do. Every method is awaited from the event loop."""

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
    turn: int = 0
    """Committed turns."""

    num_tokens: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreTotals:
    """What the store holds."""

    num_states: int
    state_bytes: int


class SessionStore(Protocol):
    """When a call that writes returns, what it wrote survives the process and the machine.

    Every call raises StorageFailed when the disk does; the store is then as before the call.
    """

    @property
    def totals(self) -> StoreTotals: ...

    async def create(self, record: SessionRecord) -> None: ...

    async def get(self, session_id: str) -> SessionRecord | None: ...

    async def list(self, limit: int, after: str | None) -> list[SessionRecord]:
        """Newest first, beginning behind the session `after`."""

    async def commit_turn(
        self, session_id: str, turn: int, num_tokens: int, used_at: float, blob: bytes
    ) -> None:
        """Make `turn` the session's last one, wholly or not at all."""

    async def load_blob(self, session_id: str) -> bytes | None: ...

    async def delete(self, session_id: str) -> bool:
        """Erase the session and its state. False if there is no such session.

        The one call that may have done half of its work when it raises: the session is gone then,
        and its bytes are erased as soon as the disk permits.
        """

    async def close(self) -> None: ...
