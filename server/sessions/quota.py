"""How many sessions and responses, and bytes of them, an owner and the whole store may hold.

Space is reserved before the work that needs it, so that no turn fails at its end for want of it. A
reservation is counted before the store is asked what it holds: what is committed in between counts
twice then, never not at all.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import QuotaExceeded, StorageFull
from server.sessions.store import Kind, Store


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
    """Space in a store. Belongs to the event loop."""

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._entries: dict[Kind, Counter[str]] = {"session": Counter(), "response": Counter()}
        self._bytes = Counter[str]()

    @asynccontextmanager
    async def reserve(
        self, owner: str, new: Kind | None = None, *, num_bytes: int = 0
    ) -> AsyncIterator[None]:
        """Hold space for an owner's new entry, or none, and bytes while they are being written.

        Raises QuotaExceeded and StorageFull.
        """
        reserved = [(self._bytes, num_bytes)]
        if new is not None:
            reserved.append((self._entries[new], 1))
        for counter, count in reserved:
            counter[owner] += count
        try:
            self._check_total(new, num_bytes)
            await self._check_owner(owner, new, num_bytes)
            yield
        finally:
            for counter, count in reserved:
                counter[owner] -= count
                if not counter[owner]:
                    del counter[owner]

    def _check_total(self, new: Kind | None, num_bytes: int) -> None:
        quotas, total = self._quotas, self._store.total
        num_sessions = total.num_sessions + self._entries["session"].total()
        if new == "session" and _exceeds(num_sessions, quotas.sessions):
            raise StorageFull(f"this server holds {total.num_sessions} sessions already")
        if num_bytes and _exceeds(total.num_bytes + self._bytes.total(), quotas.bytes):
            raise StorageFull(f"this server holds {total.num_bytes} bytes of sessions already")

    async def _check_owner(self, owner: str, new: Kind | None, num_bytes: int) -> None:
        quotas = self._quotas
        if not quotas.limit_owners:
            return
        all_bytes = self._bytes[owner]
        num_reserved = 0 if new is None else self._entries[new][owner]
        used = await self._store.usage(owner)
        match new:
            case "session" if _exceeds(used.num_sessions + num_reserved, quotas.sessions_per_owner):
                raise QuotaExceeded(
                    f"you have {used.num_sessions} sessions, the most is "
                    f"{quotas.sessions_per_owner}; delete some",
                    "session_quota_exceeded",
                )
            case "response" if _exceeds(
                used.num_responses + num_reserved, quotas.responses_per_owner
            ):
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
