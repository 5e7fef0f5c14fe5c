"""A turn: connects the ledger and the engine.

    open_turn -> AdmittedTurn: events ... -> commit or abandon -> close

Every rejection is in `open_turn`, before any header is sent. An admitted turn can still end early
by its deadline, a grammar without a valid continuation, the device, a failed commit, or a drain.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from model.decoding.sampling import SamplingParams
from model.text.tokenizer import TooManyTokens
from server.api.auth import Caller
from server.api.generation.generation import Generation
from server.api.generation.prompts import PromptSource
from server.api.generation.router import Aborted, EventQueue
from server.api.held import HOLD
from server.api.limits import Allowance
from server.api.service import Service
from server.api.texts import SHORT
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    Failed,
    Finished,
    GrammarFailed,
    InvalidLogits,
    PromptScored,
    RowDamaged,
    StoredState,
    TextDelta,
)
from server.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LatentdError,
    Overloaded,
    ShuttingDown,
    StateDamaged,
    StorageFailed,
)
from server.metrics import exemplar
from server.records import RequestRecord, TurnRecord
from server.sessions.codec import SessionState
from server.sessions.ledger import Source, Target, new_state_id
from server.sessions.ledger_turn import LedgerTurn
from server.sessions.store import StoredAnswer

log = logging.getLogger(__name__)

TextEvent = PromptScored | TextDelta | Finished
"""Events that an answer consists of."""


@dataclass(frozen=True)
class Replay:
    """The answer of an already committed turn."""

    body: str


class AdmittedTurn:
    """A turn queued in the engine. Created by `open_turn`."""

    def __init__(
        self,
        service: Service,
        opened: LedgerTurn,
        requests: Sequence[EngineRequest],
        generation: Generation,
        allowance: Allowance,
        stack: AsyncExitStack,
        started: float,
    ) -> None:
        """`stack` releases the turn's locks."""
        self._service = service
        self._opened = opened
        self._generation = generation
        self._allowance = allowance
        self._stack = stack
        self._started = started
        self._running = {request.request_id: i for i, request in enumerate(requests)}
        self._queue = EventQueue()
        self._after: SessionState | None = None
        self.is_committed = False
        """Whether the turn is committed, and durable if it is stored."""

        self._hold = HOLD.get().hand_over()
        """Of the request's body, until something has been generated."""

        self._is_closed = False
        self.texts = service.texts
        """Thread pools for long answers."""

        self.owner = requests[0].owner
        self.requests = requests
        self.start = requests[0].continuation
        """The continuation that the choices start from."""

        self.retain_as = requests[0].retain_as
        """The id of the state after the turn, if it is stored."""

        entry = opened.entry
        is_session = entry is not None and entry.kind == "session"
        self.session_id = entry.id if entry is not None and is_session else None
        """The session that the turn belongs to."""

        self.session_turn = entry.turn + 1 if entry is not None and is_session else None
        """The number of the session's turn, once committed."""

        firsts = requests[:: generation.num_per_prompt]
        num_tokens = self.start.position + sum(len(request.token_ids) for request in firsts)
        self.record = TurnRecord(
            requests[0].max_tokens, len(requests), num_tokens, generation.is_detached
        )
        """The turn's record, for logs and traces."""

    def submit(self) -> None:
        """Queue all choices or none. Raises Overloaded and ShuttingDown."""
        self._service.check_ready()
        self._service.engine.submit(*self.requests)
        self._queue = self._service.router.open(self._running)
        self._service.open_turns.add(self)

    def end(self, reason: LatentdError) -> None:
        """Make `events` raise this."""
        self._queue.put(Aborted(reason))

    async def events(
        self, silence_s: float | None = None
    ) -> AsyncIterator[list[tuple[int, TextEvent]] | None]:
        """Yields all pending events, each with the index of its choice, until every choice has
        finished; None after `silence_s` without events.

        Raises DeadlineExceeded, InvalidRequest for a grammar's dead end, InternalError,
        StateDamaged, what `LedgerTurn.damaged` returns, and ShuttingDown.
        """
        while self._running:
            if not await self._queue.wait(silence_s):
                yield None
                continue
            event = self._queue.pop()
            self._hold.release()
            match event:
                case list():
                    yield [(self._running[text.request_id], text) for text in event]
                case Finished(request_id):
                    self._service.router.close([request_id])
                    self._after = _state_after(event)
                    yield [(self._running.pop(request_id), event)]
                case Failed(_, message):
                    raise InternalError(message)
                case InvalidLogits():
                    raise self._opened.damaged(
                        "the model returned no valid probabilities for the next token"
                    )
                case RowDamaged(_, reason):
                    raise StateDamaged(reason)
                case GrammarFailed(_, reason):
                    raise InvalidRequest(
                        f"the text cannot be completed: {reason}", None, "grammar_failed"
                    )
                case DeadlinePassed():
                    raise DeadlineExceeded(self._generation.timeout_s or 0)
                case Aborted(reason):
                    raise reason

    @property
    def needs_body(self) -> bool:
        """Whether the commit stores the answer."""
        return self._opened.needs_body

    async def commit(self, body: str | None, num_generated: int) -> None:
        """Make the turn durable, then release its locks. `num_generated` tokens are charged.

        A cancellation during a successful commit comes too late: the turn is complete, and its
        readers see the end. Raises StorageFailed and ResponseGone.
        """
        try:
            await run_to_end(self._commit(body, num_generated))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.is_committed or task is None:
                raise
            task.uncancel()

    async def _commit(self, body: str | None, num_generated: int) -> None:
        if self._opened.entry is not None:
            if self._after is None or self.retain_as is None:
                raise InternalError("the engine returned a turn without its state")
            began = time.monotonic()
            await self._opened.commit(self._after, self.retain_as, body)
            self.record.committing = began, time.monotonic()
        self.is_committed = True
        self._service.metrics.answer_tokens_total.inc(num_generated)
        await self._unlock(num_generated)

    @property
    def may_come_again(self) -> bool:
        """Whether it is a chat whose client sends all of it again, to go on."""
        return self.requests[0].caches_answer and self._service.engine.keeps_prefixes

    async def anticipate(self, written: str, answer: str) -> None:
        """Have the answer read again if it will come back otherwise than the model wrote it:
        without its thoughts, or without blank lines, as the template has it.

        A state stands for what was read, so the one behind the answer is not that of such a
        history. Reading it now takes a fraction of the time that writing it took, and the next
        request needs to read nothing but what is new.
        """
        service, request = self._service, self.requests[0]
        if service.conversation is None:
            return
        most = service.settings.max_prompt_tokens
        conversation, thinks = service.conversation, self._generation.thinks
        with suppress(TooManyTokens, Overloaded, ShuttingDown):
            ids = await self.texts.run(
                len(answer), conversation.answered, request.token_ids, written, answer, most, thinks
            )
            if ids is not None:
                service.engine.submit(
                    EngineRequest(
                        request_id=secrets.token_hex(12),
                        source=request.source,
                        continuation=Continuation(),
                        token_ids=tuple(ids),
                        max_tokens=0,
                        sampling=SamplingParams(),
                        owner=request.owner,
                        caches_answer=True,
                        is_anticipated=True,
                    )
                )

    async def close(self, body: str | None, num_generated: int) -> None:
        """Cancel what still runs, and release the locks; uncommitted work is rolled back.

        `body` is stored for an uncommitted response. Completes even if the caller is cancelled.
        """
        if not self._is_closed:
            self._is_closed = True
            await run_to_end(self._close(body, num_generated))

    async def _close(self, body: str | None, num_generated: int) -> None:
        service = self._service
        self._hold.release()
        self._queue.close()
        service.router.close(self._running)
        for request_id in self._running:
            service.engine.cancel(request_id)
        try:
            if not self.is_committed:
                if self.retain_as is not None:
                    service.ledger.tiers.release(self.retain_as)
                await self._opened.abandon(body)
        except StorageFailed as error:  # reported as interrupted once the disk recovers
            log.warning("the end of a response could not be stored: %s", error)
        finally:
            service.open_turns.discard(self)
            await self._unlock(num_generated)
        service.metrics.request_duration_seconds.observe(
            time.monotonic() - self._started, exemplar(self.requests[0].client_id)
        )
        self.record.generated_tokens = num_generated
        self.record.end()

    async def _unlock(self, num_generated: int) -> None:
        await self._allowance.leave(num_generated)
        await self._stack.aclose()


async def open_turn(
    service: Service,
    caller: Caller,
    source: Source,
    target: Target,
    generation: Generation,
    prompt: PromptSource,
    pending_body: str | None = None,
    request: RequestRecord | None = None,
) -> AdmittedTurn | Replay:
    """Lock the target, load the source's state, tokenize the prompt, and queue the choices.

    `pending_body`: stored at once as the unfinished response. `request` receives the turn's record.
    Raises every LatentdError that can reject a turn: what `Ledger.begin` and `LedgerTurn.load`
    raise, InvalidRequest for the prompt, RateLimited, Overloaded, ShuttingDown, QuotaExceeded,
    StorageFull and StorageFailed.
    """
    started = time.monotonic()
    service.check_ready()
    allowance = service.limiter.enter(caller)
    stack = AsyncExitStack()
    turn: AdmittedTurn | None = None
    try:
        if generation.is_detached:
            stack.enter_context(service.streams.space(caller.owner))
        opened = await stack.enter_async_context(service.ledger.begin(caller.owner, source, target))
        if isinstance(opened, StoredAnswer):
            await allowance.leave(0)
            await stack.aclose()
            return Replay(opened.answer)
        state = await opened.load()
        start, stored = Continuation(), None
        if state is not None:
            start = Continuation(state.position, state.pending, state.undecoded, state.recent)
            stored = StoredState(opened.start_id, state.state)
        if generation.initial is not None:
            if state is not None:
                raise InvalidRequest(
                    "an initial state is for a conversation that has not begun", "initial_state"
                )
            stored = generation.initial
        await allowance.check_left()
        prompts = await _read(prompt, start, generation.thinks, allowance)
        generation.check_prompts(service.settings, prompts, start)
        timeout_s = generation.timeout_s
        requests = generation.requests(
            prompts,
            start,
            stored,
            owner=caller.owner,
            retain_as=None if opened.entry is None else new_state_id(),
            deadline=None if timeout_s is None else started + timeout_s,
            client_id="" if request is None else request.request_id,
        )
        num_tokens = sum(request.num_to_read for request in requests)
        await _check(allowance, num_tokens, len(requests))
        turn = AdmittedTurn(service, opened, requests, generation, allowance, stack, started)
        turn.submit()
        if request is not None:
            request.turn = turn.record
            request.session_id = turn.session_id or request.session_id
        await allowance.charge(num_tokens)
        if pending_body is not None:
            await opened.store_pending(pending_body)
        service.metrics.resumed_tokens_total.inc(start.position)
        return turn
    except BaseException:
        if turn is None:
            await run_to_end(allowance.leave(0))
            await run_to_end(stack.aclose())
        else:
            await turn.close(None, 0)
        raise


async def _read(
    prompt: PromptSource, start: Continuation, thinks: bool | None, allowance: Allowance
) -> list[tuple[int, ...]]:
    """A prompt that is rejected after tokenisation is charged like an accepted one."""
    try:
        return await prompt.read(start, thinks)
    except InvalidRequest:
        await allowance.charge(0)
        raise


async def _check(allowance: Allowance, num_tokens: int, num_sequences: int) -> None:
    """A prompt that is rejected for its length is charged for its tokenisation."""
    try:
        await allowance.check(num_tokens, num_sequences)
    except LatentdError:
        if num_tokens > SHORT:
            await allowance.charge(0)
        raise


async def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that continues if the caller is cancelled; the cancellation is raised
    afterwards."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # mark as retrieved
        raise cancelled
    task.result()


def _state_after(finished: Finished) -> SessionState | None:
    after = finished.continuation
    if finished.state is None or after is None:
        return None
    return SessionState(
        position=after.position,
        pending=after.pending,
        undecoded=after.undecoded,
        recent=after.recent,
        state=finished.state,
    )
