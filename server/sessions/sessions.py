"""Sessions: who may advance which, and where their states are.

A state is written through to the store at the end of its turn. The host cache and the warm rows on
the device only make it faster to get, so forgetting there loses nothing.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Literal

from server.errors import InvalidRequest, NotFound, SessionBusy, StorageFailed
from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import BlobError, Codec, SessionState
from server.sessions.store import SessionRecord, SessionStore

Tier = Literal["device", "host", "store"]


class Sessions:
    """All sessions of a server. Belongs to the event loop."""

    def __init__(
        self, store: SessionStore, cache: HostCache, codec: Codec, metrics: Metrics
    ) -> None:
        self._store = store
        self._cache = cache
        self._codec = codec
        self._metrics = metrics
        self._busy: set[str] = set()
        self._warm: dict[str, str] = {}
        """Names of the rows that are warm, by session."""

        metrics.session_state_bytes.set(codec.state_bytes)
        self._report()

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's model state, at any length of the session."""
        return self._codec.state_bytes

    async def create(self, metadata: dict[str, str]) -> SessionRecord:
        """A new session, already durable, with an id that cannot be guessed."""
        now = time.time()
        record = SessionRecord(f"sess_{secrets.token_urlsafe(24)}", now, now, metadata=metadata)
        await self._store.create(record)
        return record

    async def get(self, session_id: str) -> SessionRecord:
        """Raises NotFound."""
        record = await self._store.get(session_id)
        if record is None:
            raise _not_found(session_id)
        return record

    async def list(self, limit: int, after: str | None) -> list[SessionRecord]:
        """Newest first, beginning behind the session `after`. Raises InvalidRequest."""
        if after is not None and await self._store.get(after) is None:
            raise InvalidRequest(f"there is no session {after[:80]}", "after")
        return await self._store.list(limit, after)

    async def delete(self, session_id: str) -> str | None:
        """Erase a session and its state everywhere. Raises NotFound and SessionBusy.

        Returns the name of its warm row, if it has one, which the engine must forget.
        """
        with self._lock(session_id):
            self._cache.remove(session_id)  # first: nothing stays here if the store fails halfway
            if not await self._store.delete(session_id):
                raise _not_found(session_id)
            warm = self._warm.pop(session_id, None)
        self._report()
        return warm

    def tier(self, record: SessionRecord) -> Tier | None:
        """The fastest place that holds the session's state; None before its first turn."""
        if record.id in self._warm:
            return "device"
        if record.id in self._cache:
            return "host"
        return "store" if record.turn else None

    def is_busy(self, session_id: str) -> bool:
        return session_id in self._busy

    def row_evicted(self, name: str) -> None:
        """The engine gave a warm row to another sequence."""
        for session_id, warm in self._warm.items():
            if warm == name:
                del self._warm[session_id]
                self._metrics.session_evictions_total.labels(tier="device").inc()
                break
        self._report()

    @asynccontextmanager
    async def turn(self, session_id: str) -> AsyncIterator["SessionTurn"]:
        """The right to advance a session, for one turn. Raises NotFound and SessionBusy."""
        with self._lock(session_id):
            turn = SessionTurn(self, await self.get(session_id))
            try:
                yield turn
            finally:
                await turn.settle()

    @contextmanager
    def _lock(self, session_id: str) -> Iterator[None]:
        if session_id in self._busy:
            raise SessionBusy(session_id)
        self._busy.add(session_id)
        try:
            yield
        finally:
            self._busy.remove(session_id)

    def _report(self) -> None:
        totals = self._store.totals
        tiers = {
            "device": (len(self._warm), len(self._warm) * self.state_bytes),
            "host": (len(self._cache), self._cache.num_bytes),
            "store": (totals.num_states, totals.state_bytes),
        }
        for tier, (count, num_bytes) in tiers.items():
            self._metrics.sessions.labels(tier=tier).set(count)
            self._metrics.session_bytes.labels(tier=tier).set(num_bytes)


class SessionTurn:
    """One turn of a session that nobody else can advance meanwhile."""

    def __init__(self, sessions: Sessions, record: SessionRecord) -> None:
        self._sessions = sessions
        self._committing: asyncio.Task[None] | None = None
        self.record = record
        """The session as the last commit left it."""

    @property
    def warm(self) -> str | None:
        """The name of the row where the engine still has the state."""
        return self._sessions._warm.get(self.record.id)

    def take_warm(self) -> str | None:
        """`warm`, for a turn that continues there: the row will hold that state no longer."""
        warm = self._sessions._warm.pop(self.record.id, None)
        self._sessions._report()
        return warm

    def put_back_warm(self, name: str) -> None:
        """The row was not used after all."""
        self._sessions._warm[self.record.id] = name
        self._sessions._report()

    async def load(self) -> SessionState:
        """The state after the last turn, from host memory or the store. Raises StorageFailed."""
        sessions, session_id = self._sessions, self.record.id
        with sessions._metrics.session_load_seconds.time():
            state = sessions._cache.get(session_id)
            if state is None:
                blob = await sessions._store.load_blob(session_id)
                if blob is None:
                    raise StorageFailed(f"the state of session {session_id} is missing")
                try:
                    state = await asyncio.to_thread(sessions._codec.decode, blob)
                except BlobError as error:
                    raise StorageFailed(f"the state of session {session_id}: {error}") from error
                self._cache(state)
        return state

    async def commit(self, state: SessionState, warm: str | None) -> None:
        """Make the turn durable; on return it survives a crash. Raises StorageFailed.

        If the caller is cancelled meanwhile, the commit still takes place. `warm` is the row where
        the engine has the state.
        """
        self._committing = asyncio.create_task(self._commit(state, warm))
        await asyncio.shield(self._committing)

    async def settle(self) -> None:
        """Wait until no commit is under way, even if the caller is cancelled."""
        cancelled = None
        while self._committing is not None and not self._committing.done():
            try:
                await asyncio.wait([self._committing])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _commit(self, state: SessionState, warm: str | None) -> None:
        sessions, turn, now = self._sessions, self.record.turn + 1, time.time()
        with sessions._metrics.session_commit_seconds.time():
            blob = await asyncio.to_thread(sessions._codec.encode, state)
            await sessions._store.commit_turn(self.record.id, turn, state.position, now, blob)
        self.record = replace(self.record, turn=turn, num_tokens=state.position, last_used_at=now)
        self._cache(state)
        if warm is not None:
            sessions._warm[self.record.id] = warm
        sessions._report()

    def _cache(self, state: SessionState) -> None:
        evicted = self._sessions._cache.put(self.record.id, state)
        self._sessions._metrics.session_evictions_total.labels(tier="host").inc(evicted)
        self._sessions._report()


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"there is no session {session_id[:80]}", "session_id", "session_not_found")
