"""One turn: its state out of the fastest place, and the next one into all of them."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

from server.errors import SessionDamaged, StorageFailed
from server.metrics import Metrics
from server.sessions.codec import BlobError, Codec, SessionState
from server.sessions.places import Places
from server.sessions.store import KeptAnswer, SessionRecord, SessionStore, Turn


@dataclass(frozen=True)
class TurnCondition:
    """What a turn depends on besides the session."""

    expected_turn: int | None = None
    key: str | None = None
    """The client's Idempotency-Key: a turn that was committed with it is not taken again."""

    request: str = ""
    """What the key stands for; the same key with another request is refused."""

    @property
    def key_digest(self) -> str | None:
        return None if self.key is None else _digest(self.key)

    @property
    def request_digest(self) -> str:
        return _digest(self.request)


class Ledger(Protocol):
    """Where a turn begins and where its end is written down: a session, or a stored response."""

    @property
    def is_fresh(self) -> bool:
        """Whether the turn begins at the empty beginning, so that there is nothing to load."""

    @property
    def keeps_answer(self) -> bool:
        """Whether the commit needs the answer."""

    @property
    def warm(self) -> str | None:
        """The name of the row where the engine has the state: what the turn continues from, or,
        once it is committed, the one after it."""

    def take_warm(self) -> str | None:
        """`warm`, for a turn that continues there: the row will hold that state no longer."""

    def put_back_warm(self, name: str) -> None:
        """The row was not used after all."""

    async def load(self) -> SessionState:
        """The state that the turn continues from; only if it is not fresh.

        Raises StorageFailed, and what `damaged` returns.
        """

    async def commit(
        self, state: SessionState, warm: str | None, answer: str | None = None
    ) -> None:
        """Make the turn durable; on return it survives a crash. Raises StorageFailed.

        If the caller is cancelled meanwhile, the commit still takes place. `warm` is the row where
        the engine has the state.
        """

    async def settle(self) -> None:
        """Wait until no commit is under way, even if the caller is cancelled."""

    def damaged(self, reason: str) -> StorageFailed:
        """What to raise when the state that the turn continues from cannot be used."""


class Commits:
    """Work that goes on when its caller is cancelled."""

    def __init__(self) -> None:
        self._running: asyncio.Task[None] | None = None

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises what the work raises."""
        self._running = asyncio.create_task(work)
        await asyncio.shield(self._running)

    async def settle(self) -> None:
        """Wait until no work is under way, even if the caller is cancelled."""
        cancelled = None
        while self._running is not None and not self._running.done():
            try:
                await asyncio.wait([self._running])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


class SessionTurn:
    """A Ledger: one turn of a session that nobody else can advance meanwhile."""

    def __init__(
        self,
        store: SessionStore,
        codec: Codec,
        places: Places,
        metrics: Metrics,
        keep_turns: int,
        record: SessionRecord,
        condition: TurnCondition,
    ) -> None:
        self._store = store
        self._codec = codec
        self._places = places
        self._metrics = metrics
        self._keep_turns = keep_turns
        self._condition = condition
        self._commits = Commits()
        self.record = record
        """The session as the last commit left it."""

        self.answer: str | None = None
        """What came of this turn when it was taken before: there is nothing to do then."""

    @property
    def is_fresh(self) -> bool:
        """Whether the session is at its empty beginning, which has no state to load."""
        return not self.record.turn

    @property
    def keeps_answer(self) -> bool:
        """Whether the commit needs the answer, to give it again."""
        return self._condition.key is not None

    @property
    def warm(self) -> str | None:
        """The name of the row where the engine still has the state."""
        return self._places.warm(self.record.id, self.record.turn)

    def take_warm(self) -> str | None:
        """`warm`, for a turn that continues there: the row will hold that state no longer."""
        return self._places.take_warm(self.record.id, self.record.turn)

    def put_back_warm(self, name: str) -> None:
        """The row was not used after all."""
        self._places.set_warm(self.record.id, self.record.turn, name)

    async def load(self) -> SessionState:
        """The state after the last turn, from host memory or the store.

        Raises StorageFailed and SessionDamaged.
        """
        try:
            return await load_state(
                self._places,
                self._codec,
                self._metrics,
                self.record.id,
                self.record.turn,
                self._blob,
            )
        except BlobError as error:
            raise self.damaged(str(error)) from error

    async def commit(
        self, state: SessionState, warm: str | None, answer: str | None = None
    ) -> None:
        """Make the turn durable; on return it survives a crash. Raises StorageFailed.

        If the caller is cancelled meanwhile, the commit still takes place. `warm` is the row where
        the engine has the state, `answer` what a client gets that asks for this turn again.
        """
        await self._commits.run(self._commit(state, warm, answer))

    async def settle(self) -> None:
        """Wait until no commit is under way, even if the caller is cancelled."""
        await self._commits.settle()

    def damaged(self, reason: str) -> SessionDamaged:
        """What to raise when the state after the last turn cannot be used."""
        return SessionDamaged(self.record.id, self.record.turn, reason)

    async def _commit(self, state: SessionState, warm: str | None, answer: str | None) -> None:
        record, now = self.record, time.time()
        number = record.turn + 1
        with self._metrics.session_commit_seconds.time():
            after = replace(state, turn=number)
            blob = await asyncio.to_thread(self._codec.encode, after)
            turn = Turn(number, state.position, now, blob, self._kept(answer))
            await self._store.commit(record.id, turn, self._keep_turns)
        self.record = replace(
            record,
            turn=number,
            num_tokens=state.position,
            last_used_at=now,
            num_checkpoints=min(record.num_checkpoints + 1, self._keep_turns),
        )
        self._places.cache(record.id, after)
        if warm is not None:
            self._places.set_warm(record.id, number, warm)

    async def _blob(self) -> bytes:
        blob = await self._store.load_blob(self.record.id, self.record.turn)
        if blob is None:
            raise self.damaged("it is missing")
        return blob

    def _kept(self, answer: str | None) -> KeptAnswer | None:
        key = self._condition.key_digest
        if key is None or answer is None:
            return None
        return KeptAnswer(key, self._condition.request_digest, answer)


async def load_state(
    places: Places,
    codec: Codec,
    metrics: Metrics,
    name: str,
    turn: int,
    fetch: Callable[[], Awaitable[bytes]],
) -> SessionState:
    """A state from host memory, or else of the blob that `fetch` gets.

    Raises BlobError and what `fetch` raises.
    """
    with metrics.session_load_seconds.time():
        state = places.cached(name, turn)
        if state is None:
            num_forgotten = places.num_forgotten
            decoded = await asyncio.to_thread(codec.decode, await fetch())
            state = replace(decoded, turn=turn)
            if places.num_forgotten == num_forgotten:
                places.cache(name, state)
    return state


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
