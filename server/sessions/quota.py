"""Quotas of sessions, responses and bytes, per owner and for the whole store.

Space is reserved before the work that needs it, so that no turn fails at its commit. A reservation
is added before the store's usage is read: a concurrent commit is counted twice then, never missed.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import QuotaExceeded, StorageFull
from server.sessions.store import EntryKind, Store


@dataclass(frozen=True)
class Quotas:
    """Limits; None: unlimited. Bytes are counted as in Usage."""

    sessions_per_owner: int | None = None
    responses_per_owner: int | None = None
    bytes_per_owner: int | None = None
    sessions: int | None = None
    bytes: int | None = None

    @property
    def has_owner_limits(self) -> bool:
        """Whether there is any per-owner limit."""
        limits = (self.sessions_per_owner, self.responses_per_owner, self.bytes_per_owner)
        return any(limit is not None for limit in limits)


@dataclass(eq=False)
class Reservation:
    """Reserved space that the store does not count yet."""

    owner: str
    new: EntryKind | None
    """Kind of the entry to be added; None if none, or already counted by the store."""

    num_bytes: int


class Quota:
    """Checks and reserves space in a store. Belongs to the event loop."""

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._reserved = set[Reservation]()

    @asynccontextmanager
    async def reserve(
        self, owner: str, new: EntryKind | None = None, *, num_bytes: int = 0
    ) -> AsyncIterator[Reservation]:
        """Reserve space for an owner's new entry, if any, and bytes to be written.

        Raises QuotaExceeded and StorageFull.
        """
        reservation = Reservation(owner, new, num_bytes)
        self._reserved.add(reservation)
        try:
            self._check_total(new, num_bytes)
            await self._check_owner(owner, new, num_bytes)
            yield reservation
        finally:
            self._reserved.remove(reservation)

    def _check_total(self, new: EntryKind | None, num_bytes: int) -> None:
        quotas, total = self._quotas, self._store.total
        num_sessions = total.num_sessions + sum(r.new == "session" for r in self._reserved)
        if new == "session" and _exceeds(num_sessions, quotas.sessions):
            raise StorageFull(f"this server already has {total.num_sessions} sessions")
        all_bytes = total.num_bytes + sum(r.num_bytes for r in self._reserved)
        if num_bytes and _exceeds(all_bytes, quotas.bytes):
            raise StorageFull(f"this server already stores {total.num_bytes} bytes of sessions")

    async def _check_owner(self, owner: str, new: EntryKind | None, num_bytes: int) -> None:
        quotas = self._quotas
        if not quotas.has_owner_limits:
            return
        reserved = [r for r in self._reserved if r.owner == owner]
        num_reserved = sum(r.new == new for r in reserved)
        all_bytes = sum(r.num_bytes for r in reserved)
        used = await self._store.usage(owner)
        match new:
            case "session" if _exceeds(used.num_sessions + num_reserved, quotas.sessions_per_owner):
                raise QuotaExceeded(
                    f"you have {used.num_sessions} sessions, the maximum is "
                    f"{quotas.sessions_per_owner}; delete some",
                    "session_quota_exceeded",
                )
            case "response" if _exceeds(
                used.num_responses + num_reserved, quotas.responses_per_owner
            ):
                raise QuotaExceeded(
                    f"you have {used.num_responses} stored responses, the maximum is "
                    f"{quotas.responses_per_owner}; delete some",
                    "response_quota_exceeded",
                )
        if num_bytes and _exceeds(used.num_bytes + all_bytes, quotas.bytes_per_owner):
            raise QuotaExceeded(
                f"your sessions and responses have {used.num_bytes} bytes and need {num_bytes} "
                f"more, the maximum is {quotas.bytes_per_owner}; delete some",
                "session_bytes_quota_exceeded",
            )


def _exceeds(needed: int, most: int | None) -> bool:
    return most is not None and needed > most
