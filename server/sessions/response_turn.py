"""The turn that makes a response: it goes on from a stored one, or from nothing, and is stored."""

import asyncio
import json
from dataclasses import replace
from typing import get_args

from server.errors import InternalError, NotFound, ResponseDamaged, ResponseGone, StorageFailed
from server.metrics import Metrics
from server.sessions.codec import BlobError, Codec, SessionState
from server.sessions.places import Places
from server.sessions.store import ResponseRecord, ResponseStatus, ResponseStore
from server.sessions.turn import Commits, load_state

TURN = 1
"""The turn that a response's state is the end of: the first of what goes on from it."""


class Draft:
    """A response that is being made, and the only way in which it is written to the end.

    That happens once: after it, or after the response was deleted, nothing is written.
    """

    def __init__(self, store: ResponseStore, record: ResponseRecord, *, is_stored: bool) -> None:
        """`is_stored`: the store has this record already."""
        self._store = store
        self._is_written = False
        self.is_deleted = False
        """Set when nothing may be written any more."""

        self.record = record
        self.is_stored = is_stored

    @property
    def is_over(self) -> bool:
        return self._is_written or self.is_deleted

    async def end(self, record: ResponseRecord, blob: bytes | None = None) -> bool:
        """Store it as it has become. False: it was deleted, or written to the end before.

        Raises StorageFailed; it can be tried again then.
        """
        if self.is_over:
            return False
        self._is_written = True
        try:
            if self.is_stored:
                was_there = await self._store.finish(record, blob)
            else:
                await self._store.insert(record, blob)
                was_there = True
        except StorageFailed:
            self._is_written = False
            raise
        if not was_there or self.is_deleted:
            return False
        self.record = record
        return True


class ResponseTurn:
    """A Ledger: from the state after a response, which stays as it is, to the one after another."""

    def __init__(
        self,
        store: ResponseStore,
        codec: Codec,
        places: Places,
        metrics: Metrics,
        draft: Draft,
        previous: ResponseRecord | None,
    ) -> None:
        self._store = store
        self._codec = codec
        self._places = places
        self._metrics = metrics
        self._draft = draft
        self._commits = Commits()
        self._at = None if previous is None else previous.id
        """The response whose state the turn has reached."""

        self.previous = previous

    @property
    def record(self) -> ResponseRecord:
        """What is known of the response; its body and status when they are stored."""
        return self._draft.record

    @property
    def is_fresh(self) -> bool:
        """Whether it goes on from no response."""
        return self.previous is None

    @property
    def keeps_answer(self) -> bool:
        """The answer is what is stored."""
        return True

    @property
    def warm(self) -> str | None:
        """The row with the state after the previous response; once committed, after this one."""
        return None if self._at is None else self._places.warm(self._at, TURN)

    def take_warm(self) -> str | None:
        """`warm`, for the turn: others that go on from there find the state elsewhere."""
        return None if self._at is None else self._places.take_warm(self._at, TURN)

    def put_back_warm(self, name: str) -> None:
        """The row was not used after all."""
        if self._at is not None:
            self._places.set_warm(self._at, TURN, name)

    async def load(self) -> SessionState:
        """The state after the previous response.

        Raises NotFound when that has been deleted meanwhile, StorageFailed and ResponseDamaged.
        """
        if self.previous is None:
            raise InternalError("a response that goes on from none has no state to load")
        return await load_after(
            self._store, self._codec, self._places, self._metrics, self.previous.id
        )

    async def commit(
        self, state: SessionState, warm: str | None, answer: str | None = None
    ) -> None:
        """Store the response: `answer`, its object as JSON, and the state after it.

        On return it survives a crash. If the caller is cancelled meanwhile, the commit still takes
        place. Raises StorageFailed, and ResponseGone when it was deleted or ended otherwise.
        """
        if answer is None:
            raise InternalError("a response is stored with its object")
        await self._commits.run(self._commit(state, warm, answer))

    async def settle(self) -> None:
        """Wait until no commit is under way, even if the caller is cancelled."""
        await self._commits.settle()

    def damaged(self, reason: str) -> ResponseDamaged:
        """What to raise when the state after the previous response cannot be used."""
        return ResponseDamaged("" if self.previous is None else self.previous.id, reason)

    async def _commit(self, state: SessionState, warm: str | None, answer: str) -> None:
        with self._metrics.session_commit_seconds.time():
            after = replace(state, turn=TURN)
            blob = await asyncio.to_thread(self._codec.encode, after)
            record = with_body(self.record, answer)
            record = replace(record, num_tokens=state.position, has_state=True)
            if not await self._draft.end(record, blob):
                raise ResponseGone(record.id)
        self._at = record.id
        self._places.cache(record.id, after)
        if warm is not None:
            self._places.set_warm(record.id, TURN, warm)


def with_body(record: ResponseRecord, body: str) -> ResponseRecord:
    """The record with this response object, and the status that it tells. Raises ValueError."""
    status: ResponseStatus = json.loads(body)["status"]
    if status not in get_args(ResponseStatus):
        raise ValueError(f"a response has no status {status!r}")
    return replace(record, status=status, body=body)


async def load_after(
    store: ResponseStore, codec: Codec, places: Places, metrics: Metrics, response_id: str
) -> SessionState:
    """The state after a response. Raises NotFound, StorageFailed and ResponseDamaged."""

    async def fetch() -> bytes:
        blob = await store.load_blob(response_id)
        if blob is None:
            raise response_not_found(response_id, "previous_response_id")
        return blob

    try:
        return await load_state(places, codec, metrics, response_id, TURN, fetch)
    except BlobError as error:
        raise ResponseDamaged(response_id, str(error)) from error


def response_not_found(response_id: str, param: str) -> NotFound:
    return NotFound(f"there is no response {response_id[:80]}", param, "response_not_found")
