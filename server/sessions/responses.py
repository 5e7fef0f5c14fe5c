"""Stored responses: each is a checkpoint that any number of others can go on from.

A response is written once, with the state after it, before its client sees the end; afterwards it
only can be deleted. One that runs in the background is written at its beginning too, and whatever
is unfinished while nobody works on it has been interrupted.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from server.errors import InvalidRequest, ResponseGone
from server.metrics import Metrics
from server.sessions.codec import Codec, SessionState
from server.sessions.places import Places
from server.sessions.quota import Quota
from server.sessions.response_turn import (
    TURN,
    Draft,
    ResponseTurn,
    load_after,
    response_not_found,
    with_body,
)
from server.sessions.sessions import new_session
from server.sessions.store import ResponseRecord, ResponseStore, SessionRecord

SWEPT_TOGETHER = 256
INTERRUPTED = {
    "code": "server_error",
    "message": "the server stopped, or could not store the response, before it was complete",
}
"""The error of a response that nobody works on any more."""


class Responses:
    """All responses of a server. Belongs to the event loop.

    Whoever does not own a response gets NotFound, as for one that does not exist or has expired.
    """

    def __init__(
        self,
        store: ResponseStore,
        places: Places,
        quota: Quota,
        codec: Codec,
        metrics: Metrics,
        *,
        most_ttl_s: float | None = None,
    ) -> None:
        """`most_ttl_s`: seconds that a response is kept, at most and unless told; None: no end."""
        self._store = store
        self._places = places
        self._quota = quota
        self._codec = codec
        self._metrics = metrics
        self._most_ttl_s = most_ttl_s
        self._drafts: dict[str, Draft] = {}
        """Responses that are being made."""

    @staticmethod
    def new_id() -> str:
        """An id that cannot be guessed."""
        return f"resp_{secrets.token_urlsafe(24)}"

    async def get(self, owner: str, response_id: str, param: str = "response_id") -> ResponseRecord:
        """A stored response, finished or in the background. `param` named it. Raises NotFound."""
        record = await self._store.get(response_id)
        if record is None or record.owner != owner or self._is_over(record):
            raise response_not_found(response_id, param)
        return record

    async def state_after(self, owner: str, response_id: str) -> SessionState:
        """What a response that is not to be stored goes on from. Raises what `begin` raises."""
        await self._continuable(owner, response_id)
        return await load_after(self._store, self._codec, self._places, self._metrics, response_id)

    @asynccontextmanager
    async def begin(
        self,
        owner: str,
        previous_id: str | None,
        response_id: str,
        ttl_s: float | None = None,
    ) -> AsyncIterator[ResponseTurn]:
        """The making of a response, which goes on from the previous one.

        It is stored by its commit or by `finish_without_state`, either before the end of this
        context. One that `create_pending` made keeps its ttl. Raises NotFound, InvalidRequest for a
        previous response without a state, ResponseGone if this one was deleted before it began,
        QuotaExceeded, StorageFull and StorageFailed.
        """
        previous = None if previous_id is None else await self._continuable(owner, previous_id)
        draft, is_new = self._drafts.get(response_id), False
        if draft is None:
            record = self._record(owner, response_id, ttl_s)
            draft, is_new = Draft(self._store, record, is_stored=False), True
        self._drafts[response_id] = draft
        try:
            if draft.is_over:
                raise ResponseGone(response_id)
            size = self._codec.usual_blob_bytes
            async with self._quota.room(owner, responses=is_new, num_bytes=size):
                turn = ResponseTurn(
                    self._store, self._codec, self._places, self._metrics, draft, previous
                )
                try:
                    yield turn
                finally:
                    await turn.settle()
        finally:
            if is_new or draft.is_over:
                self._drafts.pop(response_id, None)
            self._places.report()

    async def create_pending(
        self, owner: str, response_id: str, body: str, ttl_s: float | None = None
    ) -> ResponseRecord:
        """Store a response that is to be made in the background; it is durable on return.

        `begin` with its id and a commit, or `finish_without_state`, must follow. Raises
        QuotaExceeded, StorageFull, StorageFailed, and InvalidRequest for a ttl that is too long.
        """
        record = with_body(self._record(owner, response_id, ttl_s), body)
        draft = self._drafts[response_id] = Draft(self._store, record, is_stored=True)
        try:
            async with self._quota.room(owner, responses=1, num_bytes=len(body.encode())):
                await self._store.insert(record)
        except BaseException:
            del self._drafts[response_id]
            raise
        self._places.report()
        return draft.record

    async def finish_without_state(self, owner: str, response_id: str, body: str) -> bool:
        """Store the end of a response that is being made and that nothing can go on from.

        False, and nothing is stored, if it has ended, was deleted, or is not being made. Raises
        StorageFailed; one that `create_pending` stored is then told as interrupted.
        """
        draft = self._drafts.get(response_id)
        if draft is None or draft.record.owner != owner:
            return False
        try:
            return await draft.end(with_body(draft.record, body))
        finally:
            if draft.is_stored:
                self._drafts.pop(response_id, None)
            self._places.report()

    async def delete(self, owner: str, response_id: str) -> None:
        """Erase a response and its state everywhere, also while it is being made.

        What is being made cannot be stored afterwards. Raises NotFound and StorageFailed.
        """
        draft = self._drafts.get(response_id)
        if draft is None or draft.record.owner != owner or draft.is_deleted:
            await self.get(owner, response_id)
        else:
            draft.is_deleted = True
        await self._erase(response_id)

    async def as_session(
        self, owner: str, response_id: str, metadata: dict[str, str], ttl_s: float | None
    ) -> SessionRecord:
        """A new session that begins with a copy of the state after a response.

        Raises NotFound, InvalidRequest, QuotaExceeded, StorageFull and StorageFailed.
        """
        await self._continuable(owner, response_id, "response_id")
        record = replace(new_session(owner, metadata, ttl_s), turn=TURN)
        async with self._quota.room(owner, sessions=1, num_bytes=self._codec.usual_blob_bytes):
            made = await self._store.copy_to_session(response_id, record)
        if made is None:
            raise response_not_found(response_id, "response_id")
        self._places.report()
        return made

    async def recover(self) -> int:
        """Make failed what is unfinished though nobody works on it. Returns how many were.

        Raises StorageFailed.
        """
        interrupted = await self._store.rewrite_unfinished(_interrupted, frozenset(self._drafts))
        self._places.report()
        return interrupted

    async def sweep(self) -> int:
        """`recover`, and erase what has expired.

        Returns how many were erased; there may be more if there are any. Raises StorageFailed.
        """
        await self.recover()
        expired = await self._store.expired(time.time(), SWEPT_TOGETHER)
        over = [response_id for response_id in expired if response_id not in self._drafts]
        await asyncio.gather(*(self._erase(response_id) for response_id in over))
        return len(over)

    async def _continuable(
        self, owner: str, response_id: str, param: str = "previous_response_id"
    ) -> ResponseRecord:
        """A response that has a state. Raises NotFound and InvalidRequest."""
        draft = self._drafts.get(response_id)
        if draft is not None and draft.record.owner == owner and not draft.is_over:
            record = draft.record
        else:
            record = await self.get(owner, response_id, param)
        if record.has_state:
            return record
        match record.status:
            case "failed":
                why = "failed"
            case "cancelled":
                why = "was cancelled"
            case "completed" | "incomplete":
                why = "was stored without its state"
            case _:
                why = "is not complete yet"
        raise InvalidRequest(
            f"response {response_id} {why}: nothing can go on from it", param, "response_unusable"
        )

    def _record(self, owner: str, response_id: str, ttl_s: float | None) -> ResponseRecord:
        """Of a response that begins now. Raises InvalidRequest."""
        most = self._most_ttl_s
        if ttl_s is not None and most is not None and ttl_s > most:
            raise InvalidRequest(f"ttl is {ttl_s:g}, the most is {most:g}", "ttl")
        now, ttl_s = time.time(), most if ttl_s is None else ttl_s
        expires_at = None if ttl_s is None else now + ttl_s
        return ResponseRecord(response_id, owner, now, expires_at, "in_progress", "{}")

    def _is_over(self, record: ResponseRecord) -> bool:
        """Whether its time is over; while it is being made it is not."""
        if record.expires_at is None or record.id in self._drafts:
            return False
        return record.expires_at <= time.time()

    async def _erase(self, response_id: str) -> bool:
        self._places.forget(response_id)  # first: nothing stays here if the store fails halfway
        try:
            return await self._store.delete(response_id)
        finally:
            self._places.report()


def _interrupted(record: ResponseRecord) -> ResponseRecord:
    told = json.loads(record.body) | {"status": "failed", "error": INTERRUPTED}
    return with_body(record, json.dumps(told, ensure_ascii=False))
