"""A turn in the ledger: loads its initial state and writes its result at most once."""

import asyncio
import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from typing import get_args

from model.state import DamagedState
from server.errors import (
    InternalError,
    NotFound,
    ResponseDamaged,
    ResponseGone,
    SessionDamaged,
    StateDamaged,
    StorageFailed,
)
from server.metrics import Metrics
from server.sessions.codec import BlobError, Codec, DamagedBlob, SessionState
from server.sessions.quota import Reservation
from server.sessions.store import Entry, EntryKind, NewState, Status, Store, StoredAnswer
from server.sessions.tiers import Tiers


class LedgerTurn:
    """A turn from a source's state to a target entry.

    At most one of `commit` and `abandon` takes effect.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        tiers: Tiers,
        metrics: Metrics,
        keep_turns: int,
        entry: Entry | None,
        start: Entry | None,
        is_stored: bool,
        answer: StoredAnswer | None,
        reservation: Reservation | None,
    ) -> None:
        """`answer`: where to store the turn's answer, still empty. `reservation`: space for a new
        entry."""
        self._store = store
        self._codec = codec
        self._tiers = tiers
        self._metrics = metrics
        self._keep_turns = keep_turns
        self._is_stored = is_stored
        self._is_over = False
        self._answer = answer
        self._reservation = reservation
        self.writing = asyncio.Lock()
        """Held while the entry is being written."""

        self.entry = entry
        """The target entry as last stored; None: nothing is stored."""

        self.start = start
        """The source entry; None: the empty state."""

        self.is_deleted = False
        """Set when the entry was deleted and must not be stored."""

    @property
    def state_id(self) -> str | None:
        """Id of the entry's current state."""
        return None if self.entry is None else self.entry.state_id

    @property
    def start_id(self) -> str:
        """Id of the state that `load` returns."""
        return "" if self.start is None else self.start.state_id or ""

    @property
    def needs_body(self) -> bool:
        """Whether the commit stores the answer's body."""
        return self._answer is not None or (
            self.entry is not None and self.entry.kind == "response"
        )

    def is_for(self, owner: str, kind: EntryKind) -> bool:
        """Whether its target is an owner's entry of this kind that can still be stored."""
        return (
            self.entry is not None
            and (self.entry.owner, self.entry.kind) == (owner, kind)
            and not self.is_deleted
        )

    async def load(self) -> SessionState | None:
        """Load the state that the turn continues from, from host memory or the store.

        Raises StorageFailed, NotFound if it was deleted meanwhile, and what `damaged` returns.
        """
        start = self.start
        if start is None:
            return None
        if start.state_id is None:
            raise self.damaged("it is missing")
        with self._metrics.session_load_seconds.time():
            state = self._tiers.cached(start.state_id)
            if state is not None:
                return state
            num_forgotten = self._tiers.num_forgotten
            blob = await self._store.load(start.id, start.turn)
            if blob is None:
                if await self._store.get(start.kind, start.id) is None:
                    raise not_found(start.kind, start.id, "previous_response_id")
                raise self.damaged("it is missing")
            try:
                state = await asyncio.to_thread(self._codec.decode, blob)
            except BlobError as error:
                if isinstance(error, DamagedBlob):
                    self._metrics.damaged_states_total.labels(found="store").inc()
                raise self.damaged(str(error)) from error
            self._codec.report_arithmetic(start.id, state)
            if self._tiers.num_forgotten == num_forgotten:
                self._tiers.cache(start.state_id, state, start.owner)
            return state

    def damaged(self, reason: str) -> StorageFailed:
        """The error to raise if the source's state is unusable."""
        if self.start is None:
            raise InternalError(reason)
        if self.start.kind == "response":
            return ResponseDamaged(self.start.id, reason)
        return SessionDamaged(self.start.id, self.start.turn, reason)

    async def store_pending(self, body: str) -> None:
        """Store an unfinished response. Raises StorageFailed and ResponseGone."""
        if self.entry is None:
            raise InternalError("this turn is not stored")
        entry = with_body(self.entry, body)
        await self._write(entry, None)
        self._is_stored, self.entry = True, entry
        if self._reservation is not None:
            self._reservation.new = None

    async def commit(self, state: SessionState, state_id: str, body: str | None) -> None:
        """Make the turn durable; on return it survives a crash.

        `body` is the answer, if `needs_body`. Raises StorageFailed, StateDamaged for an invalid
        state, and ResponseGone if the response was deleted.
        """
        if self.entry is None or self._is_over:
            raise InternalError("there is nothing to commit")
        entry = self.entry.used(self._store.now())
        entry = replace(entry, turn=entry.turn + 1, num_tokens=state.position)
        answer = self._answer
        if body is not None and answer is not None:
            answer = replace(answer, answer=body)
        elif body is not None:
            entry = with_body(entry, body)
        elif self.needs_body:
            raise InternalError("a turn was committed without its answer")
        with self._metrics.session_commit_seconds.time():
            state = replace(state, turn=entry.turn)
            blob = await asyncio.to_thread(self._checked_blob, state)
            try:
                await self._end(entry, NewState(state_id, blob, answer))
            except StorageFailed:
                self._metrics.session_commit_failures_total.inc()
                raise
        before, num_retained = self.entry.state_id, min(entry.num_checkpoints + 1, self._keep_turns)
        self.entry = replace(entry, state_id=state_id, num_checkpoints=num_retained)
        self._tiers.cache(state_id, state, entry.owner, replaced=before)

    async def abandon(self, body: str | None) -> None:
        """End without a commit. An already stored response gets its final body.

        Raises StorageFailed; the response is then reported as interrupted.
        """
        if self.entry is None or self.entry.kind != "response" or body is None:
            return
        if self._is_over or not self._is_stored:
            return
        with suppress(ResponseGone):
            await self._end(with_body(self.entry, body), None)

    def _checked_blob(self, state: SessionState) -> bytes:
        """Raises StateDamaged."""
        try:
            self._metrics.state_magnitude.observe(self._codec.check(state))
        except DamagedState as error:
            self._metrics.damaged_states_total.labels(found="turn").inc()
            raise StateDamaged(str(error)) from error
        self._metrics.state_position.observe(state.position)
        return self._codec.encode(state)

    async def _end(self, entry: Entry, state: NewState | None) -> None:
        self._is_over = True
        try:
            await self._write(entry, state)
        except StorageFailed:
            self._is_over = False
            raise

    async def _write(self, entry: Entry, state: NewState | None) -> None:
        async with self.writing:
            if self.is_deleted:
                raise ResponseGone(entry.id)
            try:
                if self._is_stored:
                    is_written = await self._store.advance(entry, state, self._keep_turns)
                else:
                    await self._store.insert(entry, state)
                    is_written = True
            finally:
                self._tiers.report()
        if not is_written and entry.kind == "session":
            raise StorageFailed(f"session {entry.id} is no longer at turn {entry.turn - 1}")
        if not is_written or self.is_deleted:
            raise ResponseGone(entry.id)


def with_body(entry: Entry, body: str) -> Entry:
    """The entry with this response object and its status. Raises ValueError."""
    status: Status = json.loads(body)["status"]
    if status not in get_args(Status):
        raise ValueError(f"a response has no status {status!r}")
    return replace(entry, status=status, body=body)


def pending_answer(key: str, request: str) -> StoredAnswer:
    """The empty record for the answer to a request with an Idempotency-Key."""
    return StoredAnswer(_digest(key), _digest(request), "")


def not_found(kind: EntryKind, entry_id: str, param: str | None = None) -> NotFound:
    return NotFound(
        f"there is no {kind} {entry_id[:80]}", param or f"{kind}_id", f"{kind}_not_found"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
