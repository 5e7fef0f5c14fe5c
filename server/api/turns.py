"""A turn: where a session's state and the engine meet.

lock the session -> give the engine its state -> pass events up -> commit what comes back -> unlock

Nothing of a turn that does not reach its commit is kept.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from model.sampling import SamplingParams
from server.api.service import Service
from server.engine.messages import (
    Continuation,
    EngineRequest,
    Event,
    Failed,
    Finished,
    Fresh,
    Parked,
    StateMissing,
    TextDelta,
    Warm,
)
from server.errors import InternalError
from server.sessions.codec import SessionState
from server.sessions.sessions import SessionTurn


@dataclass(frozen=True)
class ChoiceSpec:
    """What one choice of an answer is generated from."""

    token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    ignore_eos: bool


class Turn:
    """The choices of one answer, in the engine; with a session, its next turn.

    `resume`, `submit`, `events` in this order, then `close` whatever happened.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stack = AsyncExitStack()
        self._session: SessionTurn | None = None
        self._source: Fresh | Parked | Warm = Fresh()
        self._requests: dict[str, tuple[int, EngineRequest]] = {}
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.start = Continuation()
        """What the turn continues from."""

    async def resume(self, session_id: str) -> None:
        """Lock the session and find its state.

        Raises NotFound, SessionBusy and StorageFailed.
        """
        session = await self._stack.enter_async_context(self._service.sessions.turn(session_id))
        self._session = session
        if session.record.turn:
            state = await session.load()
            self._source = Parked(state.state) if session.warm is None else Warm(session.warm)
            self.start = Continuation(state.position, state.pending, state.undecoded, state.recent)

    def submit(self, choices: Sequence[ChoiceSpec]) -> None:
        """Queue every choice, or none. Raises Overloaded."""
        requests = [self._request(choice) for choice in choices]
        self._service.engine.submit(*requests)
        self._requests = {r.request_id: (index, r) for index, r in enumerate(requests)}
        self._queue = self._service.router.open(self._requests)
        self._service.metrics.resumed_tokens_total.inc(self.start.position)

    async def events(self) -> AsyncIterator[tuple[int, TextDelta | Finished]]:
        """What happens, by index of the choice, until every choice has finished.

        A session is committed when its `Finished` comes out. Raises InternalError, StorageFailed,
        Overloaded and ShuttingDown.
        """
        while self._requests:
            event = await self._next_event()
            index, request = self._requests[event.request_id]
            match event:
                case TextDelta():
                    yield index, event
                case Finished():
                    del self._requests[event.request_id]
                    self._service.router.close([event.request_id])
                    await self._commit(event)
                    yield index, event
                case Failed(_, message):
                    raise InternalError(message)
                case StateMissing():
                    await self._submit_again(request)

    async def close(self) -> None:
        """Stop what still runs and unlock the session, which is as its last commit left it."""
        self._service.router.close(self._requests)
        for request_id in self._requests:
            self._service.engine.cancel(request_id)
        self._requests = {}
        await self._stack.aclose()

    def _request(self, choice: ChoiceSpec) -> EngineRequest:
        # The bytes of half a character only matter when the text goes on where it ended.
        start = replace(self.start, undecoded=b"") if choice.token_ids else self.start
        return EngineRequest(
            request_id=secrets.token_hex(12),
            source=self._source,
            continuation=start,
            token_ids=choice.token_ids,
            max_tokens=choice.max_tokens,
            sampling=choice.sampling,
            stop=choice.stop,
            ignore_eos=choice.ignore_eos,
            keep_state=self._session is not None,
        )

    async def _next_event(self) -> Event:
        if self._queue.empty():
            getting = asyncio.ensure_future(self._queue.get())
            aborting = asyncio.ensure_future(self._service.aborting.wait())
        return await self._queue.get()

    async def _submit_again(self, request: EngineRequest) -> None:
        """The warm row went to someone else: bring the state from the host or the store."""
        if self._session is None or not isinstance(request.source, Warm):
            raise InternalError("the engine lost the state of a turn")
        self._service.sessions.forget_warm(request.source.name)
        state = await self._session.load()
        self._service.engine.submit(replace(request, source=Parked(state.state)))

    async def _commit(self, finished: Finished) -> None:
        if self._session is None:
            return
        try:
            if finished.state is None or finished.continuation is None:
                raise InternalError("the engine ended a turn without its state")
            await self._session.commit(
                self._state(finished.state, finished.continuation), finished.warm
            )
        except BaseException:
            if finished.warm is not None:
                self._service.engine.release(finished.warm)
            raise

    def _state(self, state: bytes, continuation: Continuation) -> SessionState:
        return SessionState(
            fingerprint=self._service.checkpoint.fingerprint,
            position=continuation.position,
            pending=continuation.pending,
            undecoded=continuation.undecoded,
            recent=continuation.recent,
            state=state,
        )
