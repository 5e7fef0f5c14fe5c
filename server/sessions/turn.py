"""One turn of a session: its state out of the fastest place, and the next one into all of them."""

import asyncio
import hashlib
import time
from dataclasses import dataclass, replace

from server.errors import SessionDamaged
from server.metrics import Metrics
from server.sessions.codec import EXACT, BlobError, Codec, SessionState
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


class SessionTurn:
    """One turn of a session that nobody else can advance meanwhile."""

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
        self._committing: asyncio.Task[None] | None = None
        self.record = record
        """The session as the last commit left it."""

        self.answer: str | None = None
        """What came of this turn when it was taken before: there is nothing to do then."""

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
        """The state after the last turn, from host memory or the store, in its exact form.

        Raises StorageFailed and SessionDamaged.
        """
        session_id, turn = self.record.id, self.record.turn
        with self._metrics.session_load_seconds.time():
            state = self._places.cached(session_id, turn)
            if state is None:
                blob = await self._store.load_blob(session_id, turn)
                if blob is None:
                    raise SessionDamaged(session_id, turn, "it is missing")
                try:
                    state = await asyncio.to_thread(self._codec.decode, blob)
                except BlobError as error:
                    raise SessionDamaged(session_id, turn, str(error)) from error
                state = replace(state, turn=turn)
                self._places.cache(session_id, state)
            if state.form != EXACT:
                state = await asyncio.to_thread(self._codec.unpark, state)
        return state

    async def commit(
        self, state: SessionState, warm: str | None, answer: str | None = None
    ) -> None:
        """Make the turn durable; on return it survives a crash. Raises StorageFailed.

        If the caller is cancelled meanwhile, the commit still takes place. `warm` is the row where
        the engine has the state, `answer` what a client gets that asks for this turn again.
        """
        self._committing = asyncio.create_task(self._commit(state, warm, answer))
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

    async def _commit(self, state: SessionState, warm: str | None, answer: str | None) -> None:
        record, now = self.record, time.time()
        number = record.turn + 1
        with self._metrics.session_commit_seconds.time():
            after = replace(state, turn=number)
            parked, blob = await asyncio.to_thread(self._codec.park_and_encode, after)
            turn = Turn(number, state.position, now, blob, self._kept(answer))
            await self._store.commit(record.id, turn, self._keep_turns)
        self.record = replace(
            record,
            turn=number,
            num_tokens=state.position,
            last_used_at=now,
            num_checkpoints=min(record.num_checkpoints + 1, self._keep_turns),
        )
        self._places.cache(record.id, parked)
        if warm is not None and parked.form == EXACT:
            self._places.set_warm(record.id, number, warm)

    def _kept(self, answer: str | None) -> KeptAnswer | None:
        key = self._condition.key_digest
        if key is None or answer is None:
            return None
        return KeptAnswer(key, self._condition.request_digest, answer)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
