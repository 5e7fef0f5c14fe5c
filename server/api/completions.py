"""`POST /v1/completions`: text that continues a prompt, whole or as a stream."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse

from server.api import prompts
from server.api.auth import OwnerDep
from server.api.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)
from server.api.schemas.problems import ErrorResponse
from server.api.service import Service, ServiceDep
from server.api.sse import EventStream
from server.api.turns import ChoiceSpec, Turn
from server.engine.messages import Finished, TextDelta
from server.errors import InvalidRequest
from server.sessions.turn import TurnCondition

router = APIRouter(tags=["completions"])
CLIENT_CLOSED_REQUEST = 499


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={
        200: {"content": {"text/event-stream": {}}},
        "4XX": {"model": ErrorResponse},
        504: {"model": ErrorResponse, "description": "`timeout` has passed; nothing is kept."},
        "5XX": {"model": ErrorResponse},
    },
)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    service: ServiceDep,
    owner: OwnerDep,
    x_session_id: Annotated[str | None, Header()] = None,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Continue a prompt. With a session, continue what it has read and written so far.

    A turn of a session is committed before its last event; a turn that ends in any other way
    leaves the session as it was. With an `Idempotency-Key`, a turn that was committed is not taken
    again: the same request gets the same answer, for as long as the turn's checkpoint is kept.
    Without a session nothing could be done twice, and the key has no effect.
    """
    service.check_ready()
    prompts.check_model(service, body.model)
    prompts.check_limits(service, body)
    session_id = _session_id(body, x_session_id)
    turn = Turn(service, owner, prompts.timeout_s(service, body))
    headers = {} if session_id is None else {"X-Session-ID": session_id}
    try:
        if session_id is not None:
            known = await turn.resume(session_id, _condition(body, idempotency_key))
            if known is not None:
                await turn.close()
                return _again(Completion.model_validate_json(known), body, headers)
        tokens = await prompts.read_prompts(service, body, turn.start)
        choices = prompts.choices(service, body, tokens)
        answer = _Answer(service, body, session_id, turn, tokens, choices)
        turn.submit(choices, answer)
    except BaseException:
        await asyncio.shield(turn.close())
        raise
    if body.stream:
        messages = _messages(answer, turn, service.settings.keepalive_s)
        return EventStream(messages, turn.close, headers)
    try:
        completion = await _unless_disconnected(request, answer, turn)
    finally:
        await asyncio.shield(turn.close())
    if completion is None:
        request.scope["latentd.outcome"] = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(completion.model_dump(mode="json"), headers=headers)


@dataclass
class _Choice:
    """What has come so far of one choice."""

    text: list[str] = field(default_factory=list)
    num_generated: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that this choice did not need to read."""

    reason: Literal["stop", "length"] | None = None

    def take(self, event: TextDelta | Finished) -> None:
        self.text.append(event.text)
        if isinstance(event, Finished):
            self.reason, self.num_generated = event.reason, event.num_generated
            self.cached_tokens = event.cached_tokens
        else:
            self.num_generated += 1


class _Answer:
    """Collects a completion, or renders it piece by piece."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        session_id: str | None,
        turn: Turn,
        tokens: Sequence[tuple[int, ...]],
        choices: Sequence[ChoiceSpec],
    ) -> None:
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._service = service
        self._body = body
        self._session_id = session_id
        self._session_turn = None if turn.session_turn is None else turn.session_turn + 1
        self._resumed_tokens = turn.start.position
        self._prompt_tokens = self._resumed_tokens + sum(map(len, tokens))
        self.echoes = [self._echo(choice) for choice in choices] if body.echo else []
        self.choices = [_Choice() for _ in choices]
        for choice, text in zip(self.choices, self.echoes, strict=False):
            choice.text.append(text)

    def take(self, index: int, event: TextDelta | Finished) -> None:
        """The next event of a choice."""
        self.choices[index].take(event)

    def to_json(self) -> str:
        """The whole completion."""
        return self.whole().model_dump_json()

    @property
    def usage(self) -> Usage:
        generated = sum(choice.num_generated for choice in self.choices)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )

    @property
    def _cached_tokens(self) -> int:
        """Of each prompt what none of its choices needed to read, and what the session held."""
        n = self._body.num_choices_per_prompt
        of_prompts = (self.choices[start : start + n] for start in range(0, len(self.choices), n))
        return self._resumed_tokens + sum(
            min(choice.cached_tokens for choice in choices) for choices in of_prompts
        )

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with an event for the usage."""
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def _usage_in_events(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.continuous_usage_stats)

    def completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """A completion object with these choices."""
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._service.model_name,
            system_fingerprint=f"fp_{self._service.checkpoint.fingerprint[:12]}",
            choices=choices,
            usage=usage,
            session_id=self._session_id,
            session_turn=self._session_turn if self._is_finished else None,
        )

    @property
    def _is_finished(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    def piece(self, index: int, text: str, reason: Literal["stop", "length"] | None) -> Completion:
        """One event of a stream."""
        choice = CompletionChoice(index=index, text=text, logprobs=None, finish_reason=reason)
        return self.completion([choice], self.usage if self._usage_in_events else None)

    def whole(self) -> Completion:
        """The completion when all choices have finished."""
        return self.completion(
            [
                CompletionChoice(
                    index=index,
                    text="".join(choice.text),
                    logprobs=None,
                    finish_reason=choice.reason,
                )
                for index, choice in enumerate(self.choices)
            ],
            self.usage,
        )

    def _echo(self, choice: ChoiceSpec) -> str:
        return self._service.checkpoint.tokenizer.decode(choice.token_ids)


async def _messages(
    answer: _Answer, turn: Turn, keepalive_s: float
) -> AsyncIterator[Completion | None]:
    """The events of a stream; None after a silence."""
    for index, text in enumerate(answer.echoes):
        yield answer.piece(index, text, None)
    async for happened in turn.events(keepalive_s):
        if happened is None:
            yield None
            continue
        index, event = happened
        if isinstance(event, Finished):
            yield answer.piece(index, event.text, event.reason)
        elif event.text:
            yield answer.piece(index, event.text, None)
    if answer.wants_usage:
        yield answer.completion([], answer.usage)


async def _collect(answer: _Answer, turn: Turn) -> Completion:
    async for _ in turn.events():
        pass
    return answer.whole()


def _again(known: Completion, body: CompletionRequest, headers: dict[str, str]) -> Response:
    """The answer of a turn that was taken before; its text comes in one piece."""
    headers = headers | {"Idempotent-Replayed": "true"}
    if not body.stream:
        return JSONResponse(known.model_dump(mode="json"), headers=headers)
    options = body.stream_options or StreamOptions()

    async def pieces() -> AsyncIterator[Completion | None]:
        usage = known.usage if options.continuous_usage_stats else None
        yield known.model_copy(update={"usage": usage})
        if options.include_usage:
            yield known.model_copy(update={"choices": []})

    async def nothing() -> None:
        pass

    return EventStream(pieces(), nothing, headers)


async def _unless_disconnected(request: Request, answer: _Answer, turn: Turn) -> Completion | None:
    """The completion, or None as soon as the client has gone."""
    collecting = asyncio.create_task(_collect(answer, turn))
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([collecting, watching], return_when=asyncio.FIRST_COMPLETED)
        return await collecting if collecting.done() else None
    finally:
        for task in (collecting, watching):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _condition(body: CompletionRequest, key: str | None) -> TurnCondition:
    """What the turn depends on. How an answer is delivered does not make it another one."""
    if key is None:
        return TurnCondition(body.expected_turn)
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest("it must be printable ASCII", "Idempotency-Key")
    delivery = {"session_id", "stream", "stream_options", "timeout", "user"}
    asked = body.model_dump_json(exclude=delivery, exclude_none=True)
    return TurnCondition(body.expected_turn, key, asked)


def _session_id(body: CompletionRequest, header: str | None) -> str | None:
    """The session that body or header name. Raises InvalidRequest."""
    if None not in (body.session_id, header) and body.session_id != header:
        raise InvalidRequest("session_id and the header X-Session-ID differ", "session_id")
    session_id = header if body.session_id is None else body.session_id
    if session_id is None and body.expected_turn is not None:
        raise InvalidRequest("expected_turn needs a session", "expected_turn")
    if session_id is not None and body.num_choices_per_prompt > 1:
        raise InvalidRequest("a session has one future: n must be 1", "n")
    if session_id is not None and len(body.prompts) > 1:
        raise InvalidRequest("a turn of a session has one prompt", "prompt")
    return session_id
