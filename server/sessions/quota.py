"""How many sessions, and how many bytes of them, an owner and the whole store may hold.

Room is reserved before the work that needs it, so that no turn fails at its end for want of it. A
reservation is counted before the store is asked what it holds: what is committed in between counts
twice then, never not at all.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import QuotaExceeded, StorageFull
from server.sessions.store import SessionStore


@dataclass(frozen=True)
class Quotas:
    """The most of each; None: no limit. Bytes are those of states and kept answers."""

    sessions_per_owner: int | None = None
    bytes_per_owner: int | None = None
    sessions: int | None = None
    bytes: int | None = None


class Quota:
    """Room in a store. Belongs to the event loop."""

    def __init__(self, store: SessionStore, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._reserved_sessions = Counter[str]()
        self._reserved_bytes = Counter[str]()

    @asynccontextmanager
    async def room(
        self, owner: str, *, sessions: int = 0, num_bytes: int = 0
    ) -> AsyncIterator[None]:
        """Hold room for an owner's new sessions and bytes, while they are being written.

        Raises QuotaExceeded and StorageFull.
        """
        reserved = ((self._reserved_sessions, sessions), (self._reserved_bytes, num_bytes))
        for counter, count in reserved:
            counter[owner] += count
        try:
            await self._check(owner, sessions, num_bytes)
            yield
        finally:
            for counter, count in reserved:
                counter[owner] -= count
                if not counter[owner]:
                    del counter[owner]

    async def _check(self, owner: str, sessions: int, num_bytes: int) -> None:
        quotas, total = self._quotas, self._store.total
        if sessions and _exceeds(
            total.num_sessions + self._reserved_sessions.total(), quotas.sessions
        ):
            raise StorageFull(f"this server holds {total.num_sessions} sessions already")
        if num_bytes and _exceeds(total.num_bytes + self._reserved_bytes.total(), quotas.bytes):
            raise StorageFull(f"this server holds {total.num_bytes} bytes of sessions already")
        if quotas.sessions_per_owner is None and quotas.bytes_per_owner is None:
            return
        all_sessions, all_bytes = self._reserved_sessions[owner], self._reserved_bytes[owner]
        used = await self._store.usage(owner)
        if sessions and _exceeds(used.num_sessions + all_sessions, quotas.sessions_per_owner):
            raise QuotaExceeded(
                f"you have {used.num_sessions} sessions, the most is {quotas.sessions_per_owner}; "
                "delete some",
                "session_quota_exceeded",
            )
        if num_bytes and _exceeds(used.num_bytes + all_bytes, quotas.bytes_per_owner):
            raise QuotaExceeded(
                f"your sessions hold {used.num_bytes} bytes and need {num_bytes} more, the most is "
                f"{quotas.bytes_per_owner}; delete some",
                "session_bytes_quota_exceeded",
            )


def _exceeds(needed: int, most: int | None) -> bool:
    return most is not None and needed > most
