"""How a request that generates text is answered: whole, as a stream, or as it was before."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from server.api import prompts
from server.api.answers import TIMINGS_TOLD, Answer, timing_headers
from server.api.auth import Caller
from server.api.schemas.base import EXAMPLE_SESSION, EXAMPLE_STREAM
from server.api.schemas.generation import GenerationRequest
from server.api.service import Service
from server.api.sse import EventStream, Messages
from server.api.turns import ChoiceSpec, Turn
from server.errors import InvalidRequest, NeedsStream
from server.sessions.turn import TurnCondition

CLIENT_CLOSED_REQUEST = 499

TOLD: dict[str, Any] = {
    "headers": {
        "X-Session-ID": {
            "description": "The session of which this is a turn.",
            "schema": {"type": "string", "examples": [EXAMPLE_SESSION]},
        },
        "X-Stream-ID": {
            "description": "Of a resumable stream: its id.",
            "schema": {"type": "string", "examples": [EXAMPLE_STREAM]},
        },
        "Idempotent-Replayed": {
            "description": "The turn was taken before, and this is what came of it.",
            "schema": {"type": "string", "const": "true", "examples": ["true"]},
        },
        **TIMINGS_TOLD["headers"],
    }
}
"""What an answer's headers tell, for the documentation."""

DELIVERY = {"session_id", "stream", "stream_options", "resumable", "timings", "timeout", "user"}
"""Parameters that do not make a turn another one."""


@dataclass(frozen=True)
class SessionHeaders:
    """What headers say about the session's turn."""

    session_id: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A turn that can be submitted."""

    specs: list[ChoiceSpec]
    answer: Answer


Prepare = Callable[[Turn], Awaitable[Prepared]]
"""From what the turn continues to what it generates. Raises LatentdError."""

Again = Callable[[str], Iterable[BaseModel]]
"""The events of a stream for an answer that is known already."""


@dataclass
class Exchange:
    """One request and its answer."""

    request: Request
    service: Service
    caller: Caller
    body: GenerationRequest
    given: SessionHeaders = field(default_factory=SessionHeaders)

    async def answer(self, prepare: Prepare, again: Again) -> Response:
        """Take the turn and deliver what comes of it.

        A turn of a session that was taken before with the same Idempotency-Key is not taken again:
        its answer is delivered as it was.
        """
        self.service.check_ready()
        prompts.check_model(self.service, self.body.model)
        prompts.check_limits(self.service, self.body)
        self._check_delivery()
        session_id = self._session_id()
        turn = Turn(self.service, self.caller, prompts.timeout_s(self.service, self.body))
        try:
            if session_id is not None:
                known = await turn.resume(session_id, self._condition())
                if known is not None:
                    await turn.close()
                    return self._again(known, session_id, again)
            prepared = await prepare(turn)
            if self.body.resumable:
                self.service.streams.check_room()
            await turn.submit(prepared.specs, prepared.answer)
        except BaseException:
            await asyncio.shield(turn.close())
            raise
        return await self._deliver(turn, prepared.answer)

    async def _deliver(self, turn: Turn, answer: Answer) -> Response:
        headers = _session_header(answer.session_id)
        if self.body.stream:
            messages = _messages(answer, turn, self.service.settings.keepalive_s)
            if self.body.resumable:
                stream = self.service.streams.start(
                    self.caller.owner, answer.id, messages, turn.close
                )
                headers |= {"X-Stream-ID": answer.id}
                return stream.response(self.service.settings.keepalive_s, headers=headers)
            return EventStream(messages, turn.close, headers)
        try:
            collected = await unless_disconnected(self.request, turn)
        finally:
            await asyncio.shield(turn.close())
        if not collected:
            self.request.scope["latentd.outcome"] = "cancelled"
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        headers |= timing_headers(answer.timings)
        return Response(answer.to_json(), media_type="application/json", headers=headers)

    def _again(self, known: str, session_id: str, again: Again) -> Response:
        """The answer of a turn that was taken before; its text comes in one piece."""
        headers = _session_header(session_id) | {"Idempotent-Replayed": "true"}
        if not self.body.stream:
            return Response(known, media_type="application/json", headers=headers)

        async def pieces() -> Messages:
            yield list(again(known))

        async def nothing() -> None:
            pass

        return EventStream(pieces(), nothing, headers)

    def _check_delivery(self) -> None:
        """Raises InvalidRequest for ways of delivery that go ill together."""
        body = self.body
        if body.stream_options is not None and not body.stream:
            raise NeedsStream("stream_options")
        if body.resumable and not body.stream:
            raise NeedsStream("resumable")
        if body.stream and body.num_generated_per_prompt > body.num_choices_per_prompt:
            raise InvalidRequest(
                "which choices are best is known at the end only: best_of cannot be streamed",
                "best_of",
            )

    def _condition(self) -> TurnCondition:
        """What the turn depends on. How an answer is delivered does not make it another one."""
        key = self.given.idempotency_key
        if key is None:
            return TurnCondition(self.body.expected_turn)
        asked = self.body.model_dump_json(exclude=DELIVERY, exclude_none=True)
        kind = type(self.body).__name__
        return TurnCondition(self.body.expected_turn, key, f"{kind} {asked}")

    def _session_id(self) -> str | None:
        """The session that body or header name. Raises InvalidRequest."""
        body, header = self.body, self.given.session_id
        if None not in (body.session_id, header) and body.session_id != header:
            raise InvalidRequest("session_id and the header X-Session-ID differ", "session_id")
        session_id = header if body.session_id is None else body.session_id
        if session_id is None and body.expected_turn is not None:
            raise InvalidRequest("expected_turn needs a session", "expected_turn")
        if session_id is not None and body.num_generated_per_prompt > 1:
            wrong = "n" if body.num_choices_per_prompt > 1 else "best_of"
            raise InvalidRequest(f"a session has one future: {wrong} must be 1", wrong)
        if session_id is not None and body.num_prompts > 1:
            raise InvalidRequest("a turn of a session has one prompt", "prompt")
        return session_id


def _session_header(session_id: str | None) -> dict[str, str]:
    return {} if session_id is None else {"X-Session-ID": session_id}


async def _messages(answer: Answer, turn: Turn, keepalive_s: float) -> Messages:
    """The events of a stream, as many at once as there are; None after a silence."""
    yield list(answer.opening())
    async for happened in turn.events(keepalive_s):
        if happened is None:
            yield None
        else:
            yield [piece for told in happened for piece in answer.pieces(*told)]
    yield list(answer.closing())


async def unless_disconnected(request: Request, turn: Turn) -> bool:
    """Whether the turn came to its end; False as soon as the client has gone."""
    collecting = asyncio.create_task(_collect(turn))
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([collecting, watching], return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            await collecting
        return collecting.done()
    finally:
        for task in (collecting, watching):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _collect(turn: Turn) -> None:
    async for happened in turn.events():
        for _ in happened or ():
            pass


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
