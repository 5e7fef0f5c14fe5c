"""The delivery loop: from a turn's events to its client, and the turn's commit."""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.api.generation.answer import TOKEN_SIZE, Answer, ChoiceDelta
from server.api.generation.shape import Shape, as_json
from server.api.generation.turn import AdmittedTurn, TextEvent
from server.api.problems import OUTCOME
from server.api.schemas.generation import Timings
from server.api.sse import EVENT_STREAM, NO_BUFFERING, EventData, EventSink
from server.errors import Cancelled, InternalError, LatentdError

CLIENT_CLOSED_REQUEST = 499
TIMING_HEADERS = {
    "X-Queue-Time": ("queue_s", "until the request got a row"),
    "X-Prefill-Time": ("prefill_s", "of prefill"),
    "X-Time-To-First-Token": ("first_token_s", "to the first token"),
    "X-Time-Per-Token": ("per_token_s", "between tokens, on average"),
    "X-Total-Time": ("total_s", "to the last token"),
}
"""Timing headers of responses: field and description, in seconds."""


class Sink(Protocol):
    """Receives the pieces of an answer."""

    silence_s: float | None
    """Seconds of silence after which `keep_alive` is called; None: never."""

    def encode(self, pieces: Iterable[EventData]) -> list[bytes]:
        """Encode the pieces for sending."""

    async def send(self, events: list[bytes]) -> None:
        """Send events together."""

    async def keep_alive(self) -> None: ...


class Reply:
    """Sink of an answer that is sent as a whole: sends nothing before its end."""

    silence_s: float | None = None

    def encode(self, pieces: Iterable[EventData]) -> list[bytes]:
        """Encodes nothing."""
        del pieces
        return []

    async def send(self, events: list[bytes]) -> None:
        """Does nothing."""

    async def keep_alive(self) -> None:
        """Does nothing."""


async def deliver(turn: AdmittedTurn, answer: Answer, shape: Shape[Any], sink: Sink) -> None:
    """Run the turn to its end. The last event is sent after the commit, when the client may
    continue.

    A turn that is not committed is abandoned. Raises what `AdmittedTurn.events` and `commit` raise.
    """
    ended_by: LatentdError = Cancelled()
    run = turn.texts.run

    def add(events: list[tuple[int, TextEvent]]) -> list[ChoiceDelta]:
        return [answer.add(index, event) for index, event in events]

    def encode(deltas: list[ChoiceDelta]) -> list[bytes]:
        return sink.encode(piece for delta in deltas for piece in shape.pieces(delta))

    try:
        await sink.send(await run(answer.size, lambda: sink.encode(shape.opening())))
        async for events in turn.events(sink.silence_s):
            if events is None:
                await sink.keep_alive()
                continue
            size = TOKEN_SIZE * sum(len(event.tokens) for _, event in events)
            deltas = await run(size, add, events)
            if turn.record.first_token_s is None:
                turn.record.first_token_s = time.monotonic() - turn.record.started
            if answer.is_finished:
                size, body = answer.size, None  # the last events may contain the whole answer
                if turn.needs_body:
                    body = await run(size, shape.to_json)
                await turn.commit(body, answer.num_generated)
                if turn.may_come_again:
                    [choice] = answer.choices
                    await turn.anticipate("".join(choice.written), "".join(choice.text))
            await sink.send(await run(size, encode, deltas))
        await sink.send(await run(answer.size, lambda: sink.encode(shape.closing())))
    except Exception as error:
        ended_by = error if isinstance(error, LatentdError) else InternalError()
        raise
    finally:
        body = None if turn.is_committed else as_json(shape.failed(ended_by))
        _describe(turn, answer, ended_by)
        await turn.close(body, answer.num_generated)


def _describe(turn: AdmittedTurn, answer: Answer, ended_by: LatentdError) -> None:
    """Fill in the turn's record."""
    record, timings = turn.record, answer.timings
    record.answer_id = answer.id
    record.cached_tokens = answer.usage.prompt_tokens_details.cached_tokens
    record.reasons = tuple(choice.reason for choice in answer.choices if choice.reason is not None)
    if timings is not None:
        record.queue_s, record.prefill_s = timings.queue_s, timings.prefill_s
        record.first_token_s, record.decoded_s = timings.first_token_s, timings.total_s
    if turn.is_committed:
        record.outcome = "ok"
    else:
        record.outcome, record.error = ended_by.outcome, ended_by.code


async def deliver_events(
    turn: AdmittedTurn, answer: Answer, shape: Shape[Any], sink: EventSink
) -> str:
    """`deliver` as server-sent events: an error is the last one before `[DONE]`, since the status
    was sent long ago. Returns the outcome, for the metrics."""
    outcome = "ok"
    try:
        await deliver(turn, answer, shape, sink)
    except LatentdError as error:
        outcome = error.outcome
        await sink.send(sink.encode([shape.failure(error)]))
    await sink.done()
    return outcome


async def reply(
    request: Request,
    turn: AdmittedTurn,
    answer: Answer,
    shape: Shape[Any],
    headers: dict[str, str],
) -> Response:
    """The answer as one JSON object. A disconnect ends the turn.

    Raises what `deliver` raises.
    """
    try:
        if not await run_until_disconnect(request.receive, deliver(turn, answer, shape, Reply())):
            request.scope[OUTCOME] = "cancelled"
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await turn.close(None, answer.num_generated)  # in case the delivery never started
    headers = headers | timing_headers(shape.timings)
    body = await turn.texts.run(answer.size, shape.to_json)
    return Response(body, media_type="application/json", headers=headers)


class EventStream(Response):
    """A response that runs a turn while sending its events. A disconnect ends the turn."""

    media_type = EVENT_STREAM

    def __init__(
        self,
        turn: AdmittedTurn,
        answer: Answer,
        shape: Shape[Any],
        silence_s: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers=headers | NO_BUFFERING)
        del self.headers["content-length"]
        self._turn = turn
        self._answer = answer
        self._shape = shape
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[OUTCOME] = "cancelled"

        async def write(events: list[bytes]) -> None:
            # Joined: a system call costs as much as rendering several events.
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})

        async def run() -> None:
            sink = EventSink(write, self._shape.format, self._silence_s, has_ids=False)
            scope[OUTCOME] = await deliver_events(self._turn, self._answer, self._shape, sink)

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if await run_until_disconnect(receive, run()):
                await send({"type": "http.response.body", "body": b""})
        finally:
            await self._turn.close(None, self._answer.num_generated)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until the client disconnects, which cancels it. Returns whether it completed.

    Raises what the work raises.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def timing_headers(timings: Timings | None) -> dict[str, str]:
    """Timing headers, in seconds."""
    if timings is None:
        return {}
    values = {name: getattr(timings, field) for name, (field, _) in TIMING_HEADERS.items()}
    return {name: f"{value:.6f}" for name, value in values.items() if value is not None}
