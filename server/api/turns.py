"""A turn: where a session's state and the engine meet.

lock the session -> give the engine its state -> pass events up -> commit what comes back -> unlock

Nothing of a turn that does not reach its commit is kept.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from model.grammar import Grammar
from model.sampling import SamplingParams
from server.api.auth import Caller
from server.api.router import Aborted, EventQueue, Text
from server.api.service import Service
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    Failed,
    Finished,
    Fresh,
    GrammarFailed,
    NoProbabilities,
    Parked,
    PromptScored,
    StateMissing,
    TextDelta,
    Warm,
)
from server.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LatentdError,
    Overloaded,
    ShuttingDown,
)
from server.sessions.codec import SessionState
from server.sessions.turn import Ledger, SessionTurn, TurnCondition


@dataclass(frozen=True)
class ChoiceSpec:
    """What one choice of an answer is generated from."""

    token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None
    return_tokens: bool = False
    score_prompt: bool = False
    grammar: Grammar | None = None


Told = PromptScored | TextDelta | Finished
"""What a client hears of."""

Happened = Iterator[tuple[int, Told]]
"""Events, each with the index of its choice."""


class Answer(Protocol):
    """What a turn's events are collected in."""

    def take(self, index: int, event: Told) -> None:
        """The next event of a choice."""

    def to_json(self) -> str:
        """All of it, when every choice has finished."""


class Turn:
    """The choices of one answer, in the engine; with a session, its next turn.

    `resume` or what stands for it, `submit`, `events` in this order; `close` whatever happened.
    """

    def __init__(self, service: Service, caller: Caller, timeout_s: float | None) -> None:
        """Raises RateLimited when the caller has as many requests as may run together."""
        self._allowance = service.limiter.enter(caller)
        self._service = service
        self._owner = caller.owner
        self._started = time.monotonic()
        self._timeout_s = timeout_s
        self._stack = AsyncExitStack()
        self._session: SessionTurn | None = None
        self._ledger: Ledger | None = None
        self._parked = Parked(b"")
        self._requests: dict[str, tuple[int, EngineRequest]] = {}
        self._queue = EventQueue()
        self._kept_row: str | None = None
        self._closed = False
        self._answer: Answer | None = None
        service.open_turns.add(self)
        self.start = Continuation()
        """What the turn continues from."""

    async def resume(self, session_id: str, condition: TurnCondition | None = None) -> str | None:
        """Lock the session and find its state.

        If the turn was taken before, there is nothing to do but to give its answer, which is
        returned. Raises what `Sessions.turn` raises.
        """
        session = await self._stack.enter_async_context(
            self._service.sessions.turn(self._owner, session_id, condition)
        )
        if session.answer is not None:
            return session.answer
        self._session = session
        await self._begin(session)
        return None

    async def branch(self, previous_id: str | None, response_id: str, ttl_s: float | None) -> None:
        """Make a response to be stored, from the state after the previous one.

        Instead of `resume`. Raises what `Responses.begin` raises.
        """
        responses = self._service.responses
        making = responses.begin(self._owner, previous_id, response_id, ttl_s)
        await self._begin(await self._stack.enter_async_context(making))

    def start_from(self, state: SessionState) -> None:
        """Continue from a state, and keep nothing of what follows. Instead of `resume`."""
        self._parked = Parked(state.state)
        self.start = Continuation(state.position, state.pending, state.undecoded, state.recent)

    async def _begin(self, ledger: Ledger) -> None:
        self._ledger = ledger
        if not ledger.is_fresh:
            self.start_from(await ledger.load())

    @property
    def session_id(self) -> str | None:
        """The session of which this is a turn."""
        return None if self._session is None else self._session.record.id

    @property
    def session_turn(self) -> int | None:
        """The turn that the session is at, by its last commit."""
        return None if self._session is None else self._session.record.turn

    async def submit(self, choices: Sequence[ChoiceSpec], answer: Answer | None = None) -> None:
        """Queue every choice, or none; `answer` takes the events.

        Raises Overloaded and RateLimited, and InvalidRequest for a prompt above the limit.
        """
        await self._submit(choices, answer, keep_state=self._ledger is not None)

    async def read(self, choice: ChoiceSpec) -> SessionState:
        """The state at the end, for a session that does not exist yet. Raises what `events` does.

        Instead of `resume`, `submit` and `events`.
        """
        await self._submit([choice], None, keep_state=True)
        async for happened in self.events():
            for _, event in happened or ():
                if isinstance(event, Finished):
                    return _state_after(event)
        raise InternalError("the engine did not end a turn")

    async def _submit(
        self, choices: Sequence[ChoiceSpec], answer: Answer | None, *, keep_state: bool
    ) -> None:
        num_tokens = sum(len(choice.token_ids) for choice in choices)
        await self._allowance.check(num_tokens)
        self._answer = answer
        warm = None if self._ledger is None else self._ledger.take_warm()
        source = self._source(warm)
        requests = [self._request(choice, source, keep_state) for choice in choices]
        try:
            self._service.engine.submit(*requests)
        except Overloaded:
            if self._ledger is not None and warm is not None:
                self._ledger.put_back_warm(warm)
            raise
        self._requests = {r.request_id: (index, r) for index, r in enumerate(requests)}
        self._queue = self._service.router.open(self._requests)
        self._service.metrics.resumed_tokens_total.inc(self.start.position)
        await self._allowance.charge(num_tokens)

    async def events(self, silence_s: float | None = None) -> AsyncIterator[Happened | None]:
        """What happens until every choice has finished; all that waits for the caller at once.

        None comes when nothing has happened for `silence_s`. The answer takes each event just
        before it comes out of `Happened`, which is to be read to its end, and a session is
        committed when its `Finished` comes. Raises InternalError, StorageFailed, SessionDamaged,
        Overloaded, ShuttingDown and DeadlineExceeded.
        """
        while self._requests:
            if not await self._queue.wait(silence_s):
                yield None
                continue
            event = self._queue.take()
            match event:
                case list():
                    yield self._told(event)
                case Finished(request_id):
                    self._service.router.close([request_id])
                    index, _ = self._requests.pop(request_id)
                    self._take(index, event)
                    await self._commit(event)
                    if not self._requests:
                        await self._let_go()  # a client may go on as soon as it sees the end
                    yield iter([(index, event)])
                case Failed(_, message):
                    raise InternalError(message)
                case NoProbabilities():
                    raise self._no_probabilities()
                case GrammarFailed(_, reason):
                    raise InvalidRequest(
                        f"the text cannot be completed: {reason}", None, "grammar_failed"
                    )
                case DeadlinePassed():
                    raise DeadlineExceeded(self._timeout_s or 0)
                case StateMissing(request_id):
                    self._submit_again(request_id)
                case Aborted():
                    raise ShuttingDown("the server stopped before the answer was complete")

    async def close(self) -> None:
        """Stop what still runs and unlock the session, which is as its last commit left it."""
        if self._closed:
            return
        self._closed = True
        self._queue.close()
        self._service.router.close(self._requests)
        for request_id in self._requests:
            self._service.engine.cancel(request_id)
        self._requests = {}
        try:
            await self._let_go()
        finally:
            self._service.open_turns.discard(self)
        self._service.metrics.request_duration_seconds.observe(time.monotonic() - self._started)

    async def _let_go(self) -> None:
        """Unlock the session, and give back a row that it does not use."""
        await self._allowance.leave()
        warm = None
        if self._ledger is not None:
            await self._ledger.settle()
            warm = self._ledger.warm
        kept, self._kept_row = self._kept_row, None
        if kept is not None and kept != warm:
            self._service.engine.release(kept)
        await self._stack.aclose()

    def _source(self, warm: str | None) -> Fresh | Parked | Warm:
        if warm is not None:
            return Warm(warm)
        return self._parked if self._parked.state else Fresh()

    def _request(
        self, choice: ChoiceSpec, source: Fresh | Parked | Warm, keep_state: bool
    ) -> EngineRequest:
        # The bytes of half a character only matter when the text goes on where it ended.
        start = replace(self.start, undecoded=b"") if choice.token_ids else self.start
        return EngineRequest(
            request_id=secrets.token_hex(12),
            source=source,
            continuation=start,
            token_ids=choice.token_ids,
            max_tokens=choice.max_tokens,
            sampling=choice.sampling,
            stop=choice.stop,
            stop_token_ids=choice.stop_token_ids,
            include_stop=choice.include_stop,
            ignore_eos=choice.ignore_eos,
            min_tokens=choice.min_tokens,
            num_logprobs=choice.num_logprobs,
            return_tokens=choice.return_tokens,
            score_prompt=choice.score_prompt,
            grammar=choice.grammar,
            prefix_salt=self._owner.encode(),
            keep_state=keep_state,
            deadline=None if self._timeout_s is None else self._started + self._timeout_s,
        )

    def _submit_again(self, request_id: str) -> None:
        """The warm row went to another sequence before the turn began: use the parked state."""
        _, request = self._requests[request_id]
        self._service.engine.submit(replace(request, source=self._parked))

    def _no_probabilities(self) -> LatentdError:
        """What is wrong: the state before the turn, which may have been imported, or the model."""
        reason = "the model gives no probabilities for the next token"
        if self._ledger is None or self._ledger.is_fresh:
            return InternalError(reason)
        return self._ledger.damaged(reason)

    def _told(self, texts: list[Text]) -> Happened:
        for event in texts:
            index, _ = self._requests[event.request_id]
            self._take(index, event)
            yield index, event

    def _take(self, index: int, event: Told) -> None:
        if not isinstance(event, PromptScored):
            is_whole = isinstance(event, Finished)
            self._allowance.saw(index, event.num_generated, is_whole=is_whole)
        if self._answer is not None:
            self._answer.take(index, event)

    async def _commit(self, finished: Finished) -> None:
        self._kept_row = finished.warm
        if self._ledger is None:
            return
        answer = self._answer if self._ledger.keeps_answer else None
        await self._ledger.commit(
            _state_after(finished), finished.warm, None if answer is None else answer.to_json()
        )


def _state_after(finished: Finished) -> SessionState:
    after = finished.continuation
    if finished.state is None or after is None:
        raise InternalError("the engine ended a turn without its state")
    return SessionState(
        position=after.position,
        pending=after.pending,
        undecoded=after.undecoded,
        recent=after.recent,
        state=finished.state,
    )
