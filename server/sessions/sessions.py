"""Sessions: who may advance which, and where their states are.

A state is written through to the store at the end of its turn. The host cache and the warm rows on
the device only make it faster to get, so forgetting there loses nothing.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from server.errors import (
    InvalidRequest,
    KeyReused,
    NotFound,
    SessionBusy,
    TurnMismatch,
    UnfitState,
)
from server.metrics import Metrics
from server.sessions.codec import BlobError, Codec, SessionState
from server.sessions.places import Places, Tier
from server.sessions.quota import Quota
from server.sessions.store import CheckpointRecord, KeptAnswer, SessionRecord, SessionStore
from server.sessions.turn import SessionTurn, TurnCondition

SWEPT_TOGETHER = 256


class Sessions:
    """All sessions of a server. Belongs to the event loop.

    Whoever does not own a session gets NotFound, as for one that does not exist or has expired.
    """

    def __init__(
        self,
        store: SessionStore,
        places: Places,
        quota: Quota,
        codec: Codec,
        metrics: Metrics,
        *,
        keep_turns: int = 8,
    ) -> None:
        self._store = store
        self._codec = codec
        self._metrics = metrics
        self._keep_turns = keep_turns
        self._quota = quota
        self._places = places
        self._busy = set[str]()
        """Sessions that something happens to beside which nothing else may happen."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's model state, at any length of the session."""
        return self._codec.state_bytes

    async def create(
        self,
        owner: str,
        metadata: dict[str, str],
        ttl_s: float | None = None,
        first: SessionState | None = None,
    ) -> SessionRecord:
        """A new session, already durable, with an id that cannot be guessed.

        With `first`, that is the state after its first turn. Raises QuotaExceeded and StorageFull.
        """
        record = new_session(owner, metadata, ttl_s)
        if first is None:
            return await self._add(record, None)
        state = replace(first, turn=1)
        return await self._add(record, (state, await asyncio.to_thread(self._codec.encode, state)))

    async def get(self, owner: str, session_id: str) -> SessionRecord:
        """Raises NotFound."""
        record = await self._store.get(session_id)
        if record is None or record.owner != owner or self._is_over(record):
            raise _not_found(session_id)
        return record

    async def list(self, owner: str, limit: int, after: str | None) -> list[SessionRecord]:
        """Newest first, beginning behind the session `after`. Raises InvalidRequest."""
        if after is not None:
            last = await self._store.get(after)
            if last is None or last.owner != owner:
                raise InvalidRequest(f"there is no session {after[:80]}", "after")
        return await self._store.list(owner, limit, after, time.time())

    async def checkpoints(self, owner: str, session_id: str) -> Sequence[CheckpointRecord]:
        """The turns whose states are kept, newest first. Raises NotFound."""
        await self.get(owner, session_id)
        return await self._store.checkpoints(session_id)

    async def fork(
        self,
        owner: str,
        session_id: str,
        turn: int | None,
        metadata: dict[str, str] | None = None,
        ttl_s: float | None = None,
    ) -> SessionRecord:
        """A new session that begins with a copy of a checkpoint, of the last turn if None is named.

        The session itself may be busy. Metadata and ttl are those of the session if not given.
        Raises NotFound, QuotaExceeded and StorageFull.
        """
        source = await self.get(owner, session_id)
        made = new_session(
            owner,
            source.metadata if metadata is None else metadata,
            source.ttl_s if ttl_s is None else ttl_s,
        )
        record = replace(
            made,
            turn=source.turn if turn is None else turn,
            parent_id=session_id,
            parent_turn=source.turn if turn is None else turn,
        )
        size = self._codec.usual_blob_bytes if record.turn else 0
        async with self._quota.room(owner, sessions=1, num_bytes=size):
            forked = await self._store.fork(session_id, record)
        if forked is None:
            raise await self._no_turn(session_id, record.turn)
        self._places.report()
        return forked

    async def rewind(self, owner: str, session_id: str, turn: int) -> SessionRecord:
        """Go back to a checkpoint; those after it are erased.

        Raises NotFound and SessionBusy.
        """
        await self.get(owner, session_id)
        with self._lock(session_id):
            self._places.forget(session_id)  # first: nothing stays that is later than the store
            record = await self._store.rewind(session_id, turn, time.time())
        if record is None:
            raise await self._no_turn(session_id, turn)
        self._places.report()
        return record

    async def export(
        self, owner: str, session_id: str, turn: int | None
    ) -> tuple[SessionRecord, int, bytes]:
        """The session, and a checkpoint as a blob: its turn, of the last one if None is named.

        Raises NotFound, also for the state before the first turn.
        """
        record = await self.get(owner, session_id)
        turn = record.turn if turn is None else turn
        blob = await self._store.load_blob(session_id, turn)
        if blob is None:
            raise await self._no_turn(session_id, turn)
        return record, turn, blob

    async def import_blob(
        self, owner: str, blob: bytes, metadata: dict[str, str], ttl_s: float | None
    ) -> SessionRecord:
        """A new session that goes on from an exported blob.

        Raises UnfitState, QuotaExceeded and StorageFull.
        """
        try:
            state = await asyncio.to_thread(self._codec.decode, blob)
        except BlobError as error:
            raise UnfitState(f"this is no state for this server: {error}") from error
        state = replace(state, turn=max(state.turn, 1))
        return await self._add(new_session(owner, metadata, ttl_s), (state, blob))

    async def delete(self, owner: str, session_id: str) -> None:
        """Erase a session, its checkpoints and kept answers everywhere.

        Raises NotFound and SessionBusy.
        """
        await self.get(owner, session_id)
        with self._lock(session_id):
            await self._erase(session_id)

    async def sweep(self) -> int:
        """Erase sessions that have expired. Returns how many; there may be more if there are any.

        Raises StorageFailed.
        """
        swept = 0
        for session_id in await self._store.expired(time.time(), SWEPT_TOGETHER):
            if session_id in self._busy:
                continue
            with self._lock(session_id):
                record = await self._store.get(session_id)
                if record is not None and self._is_over(record):
                    await self._erase(session_id)
                    swept += 1
        self._metrics.sessions_expired_total.inc(swept)
        return swept

    def tier(self, record: SessionRecord) -> Tier | None:
        """The fastest place that holds the session's state; None before its first turn."""
        return self._places.tier(record)

    def is_busy(self, session_id: str) -> bool:
        return session_id in self._busy

    @asynccontextmanager
    async def turn(
        self, owner: str, session_id: str, condition: TurnCondition | None = None
    ) -> AsyncIterator[SessionTurn]:
        """The right to advance a session, for one turn.

        If the turn was taken already, `SessionTurn.answer` tells what came of it, and there is
        nothing to commit. Raises NotFound, SessionBusy, TurnMismatch, KeyReused, QuotaExceeded and
        StorageFailed.
        """
        condition = condition or TurnCondition()
        if session_id in self._busy:
            record = await self.get(owner, session_id)
            kept = await self._kept_answer(session_id, condition)
            if kept is None:
                raise SessionBusy(session_id)
            yield self._turn(record, condition, kept)
            return
        with self._lock(session_id):
            record = await self.get(owner, session_id)
            kept = await self._kept_answer(session_id, condition)
            if kept is not None:
                yield self._turn(record, condition, kept)
                return
            if condition.expected_turn not in (None, record.turn):
                raise TurnMismatch(session_id, record.turn, condition.expected_turn or 0)
            is_full = record.num_checkpoints >= self._keep_turns
            size = 0 if is_full else self._codec.usual_blob_bytes
            async with self._quota.room(owner, num_bytes=size):
                turn = self._turn(record, condition)
                self._places.enter(session_id)
                try:
                    yield turn
                finally:
                    try:
                        await turn.settle()
                    finally:
                        self._places.leave(session_id)

    async def _add(
        self, record: SessionRecord, first: tuple[SessionState, bytes] | None
    ) -> SessionRecord:
        """Store a new session, with a state and its blob if it has one."""
        blob = None
        if first is not None:
            state, blob = first
            record = replace(record, turn=state.turn, num_tokens=state.position, num_checkpoints=1)
        async with self._quota.room(record.owner, sessions=1, num_bytes=len(blob or b"")):
            await self._store.create(record, blob)
        self._places.report()
        return record

    def _turn(
        self, record: SessionRecord, condition: TurnCondition, kept: KeptAnswer | None = None
    ) -> SessionTurn:
        turn = SessionTurn(
            self._store,
            self._codec,
            self._places,
            self._metrics,
            self._keep_turns,
            record,
            condition,
        )
        turn.answer = None if kept is None else kept.answer
        return turn

    @contextmanager
    def _lock(self, session_id: str) -> Iterator[None]:
        if session_id in self._busy:
            raise SessionBusy(session_id)
        self._busy.add(session_id)
        try:
            yield
        finally:
            self._busy.remove(session_id)

    def _is_over(self, record: SessionRecord) -> bool:
        """Whether it has not been used for too long; a turn that runs is use."""
        if record.expires_at is None or self._places.is_running(record.id):
            return False
        return record.expires_at <= time.time()

    async def _kept_answer(self, session_id: str, condition: TurnCondition) -> KeptAnswer | None:
        if condition.key_digest is None:
            return None
        kept = await self._store.find_answer(session_id, condition.key_digest)
        if kept is not None and kept.request != condition.request_digest:
            raise KeyReused
        return kept

    async def _erase(self, session_id: str) -> None:
        self._places.forget(session_id)  # first: nothing stays here if the store fails halfway
        if not await self._store.delete(session_id):
            raise _not_found(session_id)
        self._places.report()

    async def _no_turn(self, session_id: str, turn: int) -> NotFound:
        kept = ", ".join(str(c.turn) for c in await self._store.checkpoints(session_id))
        return NotFound(
            f"session {session_id} has no state after turn {turn}; those kept are after: "
            f"{kept or 'none'}",
            "turn",
            "turn_not_found",
        )


def new_session(owner: str, metadata: dict[str, str], ttl_s: float | None) -> SessionRecord:
    """The record of a session that begins now, with an id that cannot be guessed."""
    now, session_id = time.time(), f"sess_{secrets.token_urlsafe(24)}"
    return SessionRecord(session_id, now, now, owner, ttl_s=ttl_s, metadata=metadata)


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"there is no session {session_id[:80]}", "session_id", "session_not_found")
