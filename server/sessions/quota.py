"""How many sessions and responses, and bytes of them, an owner and the whole store may hold.

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
    """The most of each; None: no limit. Bytes are those that Usage counts."""

    sessions_per_owner: int | None = None
    responses_per_owner: int | None = None
    bytes_per_owner: int | None = None
    sessions: int | None = None
    bytes: int | None = None

    @property
    def limit_owners(self) -> bool:
        """Whether there is any limit for an owner."""
        limits = (self.sessions_per_owner, self.responses_per_owner, self.bytes_per_owner)
        return any(limit is not None for limit in limits)


class Quota:
    """Room in a store. Belongs to the event loop."""

    def __init__(self, store: SessionStore, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._reserved_sessions = Counter[str]()
        self._reserved_responses = Counter[str]()
        self._reserved_bytes = Counter[str]()

    @asynccontextmanager
    async def room(
        self, owner: str, *, sessions: int = 0, responses: int = 0, num_bytes: int = 0
    ) -> AsyncIterator[None]:
        """Hold room for an owner's new sessions, responses and bytes, while they are being written.

        Raises QuotaExceeded and StorageFull.
        """
        reserved = (
            (self._reserved_sessions, sessions),
            (self._reserved_responses, responses),
            (self._reserved_bytes, num_bytes),
        )
        for counter, count in reserved:
            counter[owner] += count
        try:
            self._check_total(sessions, num_bytes)
            await self._check_owner(owner, sessions, responses, num_bytes)
            yield
        finally:
            for counter, count in reserved:
                counter[owner] -= count
                if not counter[owner]:
                    del counter[owner]

    def _check_total(self, sessions: int, num_bytes: int) -> None:
        quotas, total = self._quotas, self._store.total
        if sessions and _exceeds(
            total.num_sessions + self._reserved_sessions.total(), quotas.sessions
        ):
            raise StorageFull(f"this server holds {total.num_sessions} sessions already")
        if num_bytes and _exceeds(total.num_bytes + self._reserved_bytes.total(), quotas.bytes):
            raise StorageFull(f"this server holds {total.num_bytes} bytes of sessions already")

    async def _check_owner(self, owner: str, sessions: int, responses: int, num_bytes: int) -> None:
        quotas = self._quotas
        if not quotas.limit_owners:
            return
        all_sessions = self._reserved_sessions[owner]
        all_responses = self._reserved_responses[owner]
        all_bytes = self._reserved_bytes[owner]
        used = await self._store.usage(owner)
        if sessions and _exceeds(used.num_sessions + all_sessions, quotas.sessions_per_owner):
            raise QuotaExceeded(
                f"you have {used.num_sessions} sessions, the most is {quotas.sessions_per_owner}; "
                "delete some",
                "session_quota_exceeded",
            )
        if responses and _exceeds(used.num_responses + all_responses, quotas.responses_per_owner):
            raise QuotaExceeded(
                f"you have {used.num_responses} stored responses, the most is "
                f"{quotas.responses_per_owner}; delete some",
                "response_quota_exceeded",
            )
        if num_bytes and _exceeds(used.num_bytes + all_bytes, quotas.bytes_per_owner):
            raise QuotaExceeded(
                f"your sessions and responses hold {used.num_bytes} bytes and need {num_bytes} "
                f"more, the most is {quotas.bytes_per_owner}; delete some",
                "session_bytes_quota_exceeded",
            )


def _exceeds(needed: int, most: int | None) -> bool:
    return most is not None and needed > most
