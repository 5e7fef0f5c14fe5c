"""The ledger: sessions and stored responses, and the turns that advance them.

A turn goes from a source to a target. Its state is written through to the store, so the host cache
and the rows on the device only make it faster to load.
"""

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from model.decoding.sampling import RecentTokens
from server.errors import (
    IncompatibleState,
    InvalidRequest,
    KeyReused,
    NotFound,
    SessionBusy,
    SessionDamaged,
    TurnMismatch,
)
from server.metrics import Metrics
from server.sessions.codec import BlobError, Codec, DamagedBlob, SessionState
from server.sessions.erasure import entries_of
from server.sessions.ledger_turn import LedgerTurn, not_found, pending_answer, with_body
from server.sessions.quota import Quota, Reservation
from server.sessions.store import (
    Entry,
    EntryKind,
    NewState,
    Store,
    StoredAnswer,
    StoreHealth,
    StoreUsage,
    TurnCheckpoint,
)
from server.sessions.tiers import Tier, Tiers
from server.threads import FairThreads

SWEEP_BATCH = 256
INTERRUPTED = {
    "code": "server_error",
    "message": "the server stopped, or could not store the response, before it was complete",
}
"""The error of an interrupted response."""


@dataclass(frozen=True)
class SessionHead:
    """The state after a session's last turn, which must be `expected_turn` if given."""

    session_id: str
    expected_turn: int | None = None


@dataclass(frozen=True)
class AfterResponse:
    """The state after a stored response."""

    response_id: str
    param: str = "previous_response_id"
    """The parameter that named it."""


Source = SessionHead | AfterResponse | None
"""What a turn continues from; None: the empty state."""


@dataclass(frozen=True)
class NextTurn:
    """The next turn of the source session."""

    key: str | None = None
    """The client's Idempotency-Key: a turn committed with it is replayed."""

    request: str = ""
    """The request that the key identifies; another request with it is rejected."""


@dataclass(frozen=True)
class NewSession:
    """A new session, with this as its first turn."""

    metadata: dict[str, str] = field(default_factory=dict)
    ttl_s: float | None = None


@dataclass(frozen=True)
class NewResponse:
    """A new stored response."""

    id: str
    ttl_s: float | None = None


Target = NextTurn | NewSession | NewResponse | None
"""Where a turn's result is stored; None: nowhere."""


class Ledger:
    """All sessions and stored responses. Belongs to the event loop.

    Other owners get NotFound, as for an entry that does not exist or has expired.
    """

    def __init__(
        self,
        store: Store,
        tiers: Tiers,
        quota: Quota,
        codec: Codec,
        metrics: Metrics,
        *,
        keep_turns: int = 8,
        session_wait_s: float = 1.5,
        max_response_ttl_s: float | None = None,
    ) -> None:
        """`session_wait_s`: seconds to wait for a busy session, whose client may have just
        disconnected. `max_response_ttl_s`: maximum and default lifetime of responses in seconds;
        None: unlimited."""
        self._store = store
        self._tiers = tiers
        self._quota = quota
        self._codec = codec
        self._metrics = metrics
        self._keep_turns = keep_turns
        self._busy_wait_s = session_wait_s
        self._max_response_ttl_s = max_response_ttl_s
        self._open: dict[str, LedgerTurn | None] = {}
        """Locked entries: being advanced by a turn, rewound or erased."""

        self._blobs = FairThreads(1, "blobs")
        """Threads for blobs that clients import and export; turns have other threads."""

        self._unlocked: dict[str, asyncio.Event] = {}
        """Events for waiters on locked entries."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a state, at any length of its conversation."""
        return self._codec.state_bytes

    @property
    def tiers(self) -> Tiers:
        return self._tiers

    async def store_health(self) -> StoreHealth:
        """Check the store's disk."""
        return await self._store.health()

    def close(self) -> None:
        """Wait for running reads. Called from another thread."""
        self._blobs.close()

    @asynccontextmanager
    async def begin(
        self, owner: str, source: Source, target: Target
    ) -> AsyncIterator[LedgerTurn | StoredAnswer]:
        """Begin a turn, or return the answer committed with its key.

        A session has one turn at a time; a response can be continued concurrently. Raises NotFound,
        SessionBusy, TurnMismatch, KeyReused, InvalidRequest, QuotaExceeded, StorageFull and
        StorageFailed.
        """
        match source, target:
            case SessionHead(), NextTurn():
                opening = self._next_turn(owner, source, target)
            case SessionHead(), _:
                raise ValueError("a session's head is only advanced by its next turn")
            case _, NextTurn():
                raise ValueError("a session's next turn starts from its head")
            case _:
                opening = self._first_turn(owner, source, target)
        async with opening as turn:
            yield turn

    @asynccontextmanager
    async def _next_turn(
        self, owner: str, source: SessionHead, target: NextTurn
    ) -> AsyncIterator[LedgerTurn | StoredAnswer]:
        session_id = source.session_id
        if session_id in self._open:
            await self.get(owner, "session", session_id)
            kept = await self._stored_answer(session_id, target)
            if kept is not None:
                yield kept
                return
        async with self._lock(session_id):
            entry = await self.get(owner, "session", session_id)
            kept = await self._stored_answer(session_id, target)
            if kept is not None:
                yield kept
                return
            if source.expected_turn not in (None, entry.turn):
                raise TurnMismatch(session_id, entry.turn, source.expected_turn or 0)
            is_full = entry.num_checkpoints >= self._keep_turns
            size = 0 if is_full else self._codec.typical_blob_bytes
            if target.key is not None:  # its answer is stored too, of unknown length
                size = max(size, 1)
            async with self._quota.reserve(owner, num_bytes=size):
                answer = None if target.key is None else pending_answer(target.key, target.request)
                turn = self._turn(entry, entry if entry.turn else None, True, answer)
                self._open[session_id] = turn
                yield turn

    @asynccontextmanager
    async def _first_turn(
        self, owner: str, source: AfterResponse | None, target: NewSession | NewResponse | None
    ) -> AsyncIterator[LedgerTurn]:
        start = None if source is None else await self._find_source(owner, source)
        match target:
            case None:
                yield self._turn(None, start, False)
                return
            case NewSession(metadata, ttl_s):
                entry = new_session(owner, self._store.now(), metadata, ttl_s)
            case NewResponse(response_id, ttl_s):
                entry = self._new_response(owner, response_id, ttl_s)
        size = entry.num_bytes + self._codec.typical_blob_bytes
        reserving = self._quota.reserve(owner, entry.kind, num_bytes=size)
        async with reserving as reservation, self._lock(entry.id):
            turn = self._turn(entry, start, False, reservation=reservation)
            self._open[entry.id] = turn
            yield turn

    def _turn(
        self,
        entry: Entry | None,
        start: Entry | None,
        is_stored: bool,
        answer: StoredAnswer | None = None,
        reservation: Reservation | None = None,
    ) -> LedgerTurn:
        parts = (self._store, self._codec, self._tiers, self._metrics, self._keep_turns)
        return LedgerTurn(*parts, entry, start, is_stored, answer, reservation)

    async def get(
        self, owner: str, kind: EntryKind, entry_id: str, param: str | None = None
    ) -> Entry:
        """Get a session or stored response, finished or in the background. `param` named it.

        Raises NotFound.
        """
        entry = await self._store.get(kind, entry_id)
        if entry is None or entry.owner != owner or self._is_over(entry):
            raise not_found(kind, entry_id, param)
        return entry

    async def list(self, owner: str, kind: EntryKind, limit: int, after: str | None) -> list[Entry]:
        """List entries, newest first, after the entry `after`. Raises InvalidRequest."""
        if after is not None:
            last = await self._store.get(kind, after)
            if last is None or last.owner != owner:
                raise InvalidRequest(f"there is no {kind} {after[:80]}", "after")
        return await self._store.list(kind, owner, limit, after, self._store.now())

    async def checkpoints(self, owner: str, session_id: str) -> Sequence[TurnCheckpoint]:
        """The session's checkpoints, newest first. Raises NotFound."""
        await self.get(owner, "session", session_id)
        return await self._store.checkpoints(session_id)

    async def create(
        self, owner: str, metadata: dict[str, str], ttl_s: float | None = None
    ) -> Entry:
        """A new session without a turn. Raises QuotaExceeded, StorageFull and StorageFailed."""
        return await self._insert(new_session(owner, self._store.now(), metadata, ttl_s))

    async def fork(
        self,
        owner: str,
        session_id: str,
        turn: int | None,
        metadata: dict[str, str] | None = None,
        ttl_s: float | None = None,
    ) -> Entry:
        """Create a session from a session's state after a turn, by default the last.

        The source session may be busy. Metadata and ttl default to the source's. Raises NotFound,
        QuotaExceeded, StorageFull and StorageFailed.
        """
        source = await self.get(owner, "session", session_id)
        made = new_session(
            owner,
            self._store.now(),
            source.metadata if metadata is None else metadata,
            source.ttl_s if ttl_s is None else ttl_s,
        )
        number = source.turn if turn is None else turn
        made = replace(made, turn=number, parent_id=session_id, parent_turn=number)
        forked = await self._fork(session_id, made)
        if forked is None:
            raise await self._no_turn(session_id, number)
        return forked

    async def fork_response(
        self, owner: str, response_id: str, metadata: dict[str, str], ttl_s: float | None
    ) -> Entry:
        """Create a session from the state after a response.

        Raises NotFound, InvalidRequest, QuotaExceeded, StorageFull and StorageFailed.
        """
        source = await self._find_source(owner, AfterResponse(response_id, "response_id"))
        made = replace(new_session(owner, self._store.now(), metadata, ttl_s), turn=source.turn)
        forked = await self._fork(response_id, made)
        if forked is None:
            raise not_found("response", response_id)
        return forked

    async def rewind(self, owner: str, session_id: str, turn: int) -> Entry:
        """Go back to a turn and erase later ones. Raises NotFound and SessionBusy."""
        await self.get(owner, "session", session_id)
        async with self._lock(session_id):
            before = await self.get(owner, "session", session_id)
            if turn != before.turn:  # first: nothing is cached if the caller is cancelled
                self._tiers.forget(before.state_id)
            rewound = await self._store.rewind(session_id, turn, self._store.now())
        if rewound is None:
            raise await self._no_turn(session_id, turn)
        self._tiers.report()
        return rewound

    async def export(
        self, owner: str, session_id: str, turn: int | None
    ) -> tuple[Entry, int, bytes]:
        """The session, the turn, and the blob of its state; default: the last turn.

        Raises NotFound, also for the state before the first turn, and SessionDamaged.
        """
        entry = await self.get(owner, "session", session_id)
        turn = entry.turn if turn is None else turn
        blob = await self._store.load(session_id, turn)
        if blob is None:
            raise await self._no_turn(session_id, turn)
        try:
            await self._blobs.run(owner, partial(self._codec.decode, blob))
        except DamagedBlob as error:
            self._metrics.damaged_states_total.labels(found="store").inc()
            raise SessionDamaged(session_id, turn, str(error)) from error
        except BlobError:
            pass  # of another model, which may read it
        return entry, turn, blob

    async def import_blob(
        self, owner: str, blob: bytes, metadata: dict[str, str], ttl_s: float | None
    ) -> tuple[Entry, str | None]:
        """A new session from an exported blob, and the arithmetic that computed it.

        Raises IncompatibleState, QuotaExceeded, StorageFull and StorageFailed.
        """
        if len(blob) > self._codec.max_blob_bytes:
            raise IncompatibleState(
                f"this is not a state for this server: it has {len(blob)} bytes, the maximum is "
                f"{self._codec.max_blob_bytes}"
            )
        try:
            state = await self._blobs.run(owner, partial(self._codec.decode_foreign, blob))
        except BlobError as error:
            raise IncompatibleState(f"this is not a state for this server: {error}") from error
        entry = await self._insert_with(owner, state, blob, metadata, ttl_s)
        self._codec.report_arithmetic(entry.id, state)
        return entry, state.arithmetic

    async def import_state(
        self, owner: str, data: bytes, metadata: dict[str, str], ttl_s: float | None
    ) -> Entry:
        """A new session whose first state has these bytes.

        Raises IncompatibleState, QuotaExceeded, StorageFull and StorageFailed.
        """
        state = SessionState(0, (), b"", RecentTokens().to_bytes(), data, turn=1)

        def encode() -> bytes:
            self._codec.check_foreign(state)
            return self._codec.encode(state)

        try:
            blob = await self._blobs.run(owner, encode)
        except BlobError as error:
            raise IncompatibleState(f"this is not a state for this server: {error}") from error
        return await self._insert_with(owner, state, blob, metadata, ttl_s)

    async def _insert_with(
        self,
        owner: str,
        state: SessionState,
        blob: bytes,
        metadata: dict[str, str],
        ttl_s: float | None,
    ) -> Entry:
        entry = new_session(owner, self._store.now(), metadata, ttl_s)
        entry = replace(entry, turn=max(state.turn, 1), num_tokens=state.position)
        return await self._insert(entry, NewState(new_state_id(), blob))

    async def delete(self, owner: str, kind: EntryKind, entry_id: str) -> None:
        """Erase a session or response with its states and answers in all tiers.

        A response in progress cannot be stored afterwards. A session must not be busy. Raises
        NotFound, SessionBusy and StorageFailed.
        """
        in_progress = self._open.get(entry_id)
        if kind == "response" and in_progress is not None and in_progress.is_for(owner, kind):
            in_progress.is_deleted = True
            async with in_progress.writing:  # wait for a write in progress
                await self._erase(kind, entry_id, in_progress.state_id)
            return
        await self.get(owner, kind, entry_id)
        async with self._lock(entry_id) if kind == "session" else nullcontext():
            entry = await self.get(owner, kind, entry_id)
            if not await self._erase(kind, entry_id, entry.state_id):
                raise not_found(kind, entry_id)

    async def usage(self, owner: str) -> StoreUsage:
        """An owner's usage of the store."""
        return await self._store.usage(owner)

    async def erase_all(self, owner: str) -> Counter[EntryKind]:
        """Erase all data of an owner without running turns. Returns the numbers of sessions and
        responses. Raises StorageFailed."""
        erased = Counter[EntryKind]()
        while found := await entries_of(self._store, owner):
            for entry in found:
                erased[entry.kind] += await self._erase(entry.kind, entry.id, entry.state_id)
        return erased

    async def sweep(self) -> int:
        """Erase expired entries, and mark interrupted responses as failed.

        Returns how many were erased; if any, there may be more. Raises StorageFailed.
        """
        await self.recover()
        num_swept = num_sessions = 0
        for found in await self._store.expired(self._store.now(), SWEEP_BATCH):
            if found.id in self._open:
                continue
            async with self._lock(found.id):
                entry = await self._store.get(found.kind, found.id)
                if entry is not None and self._has_expired(entry):
                    await self._erase(entry.kind, entry.id, entry.state_id)
                    num_swept += 1
                    num_sessions += entry.kind == "session"
        self._metrics.sessions_expired_total.inc(num_sessions)
        return num_swept

    async def recover(self) -> int:
        """Mark unfinished responses without a running turn as failed. Returns their number. Raises
        StorageFailed."""
        interrupted = await self._store.rewrite_unfinished(_interrupted, frozenset(self._open))
        self._tiers.report()
        return interrupted

    def tier(self, entry: Entry) -> Tier | None:
        """The fastest tier with the entry's state; None before its first turn."""
        return "device" if self._open.get(entry.id) is not None else self._tiers.tier(entry)

    def is_busy(self, entry_id: str) -> bool:
        return entry_id in self._open

    async def _insert(self, entry: Entry, state: NewState | None = None) -> Entry:
        size = entry.num_bytes + (0 if state is None else len(state.blob))
        async with self._quota.reserve(entry.owner, entry.kind, num_bytes=size):
            await self._store.insert(entry, state)
        self._tiers.report()
        if state is None:
            return entry
        return replace(entry, state_id=state.id, num_checkpoints=1)

    async def _fork(self, source_id: str, made: Entry) -> Entry | None:
        size = made.num_bytes + (self._codec.typical_blob_bytes if made.turn else 0)
        async with self._quota.reserve(made.owner, made.kind, num_bytes=size):
            forked = await self._store.fork(source_id, made)
        self._tiers.report()
        return forked

    async def _erase(self, kind: EntryKind, entry_id: str, state_id: str | None) -> bool:
        self._tiers.forget(state_id)  # first: nothing is cached if the store fails halfway
        try:
            return await self._store.delete(kind, entry_id)
        finally:
            self._tiers.report()

    async def _find_source(self, owner: str, source: AfterResponse) -> Entry:
        """A response with a state. Raises NotFound and InvalidRequest."""
        in_progress = self._open.get(source.response_id)
        if (
            in_progress is not None
            and in_progress.entry is not None
            and in_progress.is_for(owner, "response")
        ):
            entry = in_progress.entry
        else:
            entry = await self.get(owner, "response", source.response_id, source.param)
        if entry.state_id is not None:
            return entry
        match entry.status:
            case "failed":
                why = "failed"
            case "cancelled":
                why = "was cancelled"
            case "completed" | "incomplete":
                why = "was stored without its state"
            case _:
                why = "is not complete yet"
        raise InvalidRequest(
            f"response {entry.id} {why}: it cannot be continued",
            source.param,
            "response_unusable",
        )

    def _new_response(self, owner: str, response_id: str, ttl_s: float | None) -> Entry:
        """Entry of a new response. Raises InvalidRequest and ResponseGone."""
        most = self._max_response_ttl_s
        if ttl_s is not None and most is not None and ttl_s > most:
            raise InvalidRequest(f"ttl is {ttl_s:g}, the maximum is {most:g}", "ttl")
        now, ttl_s = self._store.now(), most if ttl_s is None else ttl_s
        expires_at = None if ttl_s is None else now + ttl_s
        return Entry(
            "response", response_id, owner, now, now, expires_at=expires_at, status="in_progress"
        )

    @asynccontextmanager
    async def _lock(self, entry_id: str) -> AsyncIterator[None]:
        """Lock an entry, waiting for a busy one. Raises SessionBusy on timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._busy_wait_s):
                while entry_id in self._open:  # another waiter may have been faster
                    await self._unlocked.setdefault(entry_id, asyncio.Event()).wait()
        if entry_id in self._open:
            raise SessionBusy(entry_id)
        self._open[entry_id] = None
        try:
            yield
        finally:
            del self._open[entry_id]
            unlocked = self._unlocked.pop(entry_id, None)
            if unlocked is not None:
                unlocked.set()

    def _is_over(self, entry: Entry) -> bool:
        """Whether it has expired; never while a turn runs."""
        return self._has_expired(entry) and self._open.get(entry.id) is None

    def _has_expired(self, entry: Entry) -> bool:
        return entry.expires_at is not None and entry.expires_at <= self._store.now()

    async def _stored_answer(self, session_id: str, target: NextTurn) -> StoredAnswer | None:
        if target.key is None:
            return None
        asked = pending_answer(target.key, target.request)
        kept = await self._store.find_answer(session_id, asked.key)
        if kept is not None and kept.request != asked.request:
            raise KeyReused
        return kept

    async def _no_turn(self, session_id: str, turn: int) -> NotFound:
        kept = ", ".join(str(c.turn) for c in await self._store.checkpoints(session_id))
        return NotFound(
            f"session {session_id} has no checkpoint of turn {turn}; available turns: "
            f"{kept or 'none'}",
            "turn",
            "turn_not_found",
        )


def new_state_id() -> str:
    """A new unguessable, globally unique state id."""
    return secrets.token_hex(16)


def new_response_id() -> str:
    """A new unguessable id."""
    return f"resp_{secrets.token_urlsafe(24)}"


def new_session(owner: str, now: float, metadata: dict[str, str], ttl_s: float | None) -> Entry:
    """A new session with an unguessable id."""
    session_id = f"sess_{secrets.token_urlsafe(24)}"
    return Entry("session", session_id, owner, now, now, ttl_s=ttl_s, metadata=metadata).used(now)


def _interrupted(entry: Entry) -> Entry:
    body = json.loads(entry.body or "{}") | {"status": "failed", "error": INTERRUPTED}
    return with_body(entry, json.dumps(body, ensure_ascii=False))
