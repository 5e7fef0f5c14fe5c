"""Completions and chats: from a request to its response, with or without a session."""

from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from server.api.auth import Caller
from server.api.generation.answer import Answer, new_id
from server.api.generation.deliver import TIMING_HEADERS, EventStream, reply
from server.api.generation.detached import start_stream
from server.api.generation.generation import read_generation
from server.api.generation.prompts import PromptSource
from server.api.generation.shape import TurnShape
from server.api.generation.turn import Replay, open_turn
from server.api.problems import record_of
from server.api.schemas.base import EXAMPLE_SESSION, EXAMPLE_STREAM
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import GenerationRequest
from server.api.service import Service
from server.api.texts import LONG
from server.errors import InvalidRequest, NeedsStream
from server.sessions.ledger import NextTurn, SessionHead

TIMING_HEADERS_DOC: dict[str, Any] = {
    name: {
        "description": f"With `timings`: seconds {what}.",
        "schema": {"type": "number", "minimum": 0, "examples": [0.0042]},
    }
    for name, (_, what) in TIMING_HEADERS.items()
}
ANSWER_HEADERS_DOC: dict[str, Any] = {
    "X-Session-ID": {
        "description": "The session that the turn belongs to.",
        "schema": {"type": "string", "examples": [EXAMPLE_SESSION]},
    },
    "X-Stream-ID": {
        "description": "The id of a resumable stream.",
        "schema": {"type": "string", "examples": [EXAMPLE_STREAM]},
    },
    "Idempotent-Replayed": {
        "description": "The turn was already committed; its answer is replayed.",
        "schema": {"type": "string", "const": "true", "examples": ["true"]},
    },
    **TIMING_HEADERS_DOC,
}
"""Response headers, for the documentation."""

DELIVERY = {
    *("session_id", "stream", "stream_options", "resumable", "timings", "timeout", "user"),
    *("priority", "service_tier"),
}
"""Parameters that do not distinguish turns."""


@dataclass(frozen=True)
class SessionHeaders:
    """Request headers about the session's turn."""

    session_id: str | None = None
    idempotency_key: str | None = None


async def answer_turn(
    request: Request,
    service: Service,
    caller: Caller,
    body: GenerationRequest,
    given: SessionHeaders,
    prompt: PromptSource,
    shape_type: type[TurnShape[Any]],
) -> Response:
    """Run a turn and deliver its answer in the requested form.

    A session's turn that was already committed with the same Idempotency-Key is replayed. Raises
    LatentdError.
    """
    record = record_of(request.scope)
    record.streams = bool(body.stream)
    _check_delivery(body)
    session_id = _session_id(body, given)
    generation = await read_generation(
        service, body, caller=caller, is_detached=bool(body.resumable)
    )
    source = target = None
    if session_id is not None:
        source = SessionHead(session_id, body.expected_turn)
        key = given.idempotency_key
        identity = "" if key is None else await service.texts.run(LONG, _identity, body)
        target = NextTurn(key, identity)
    record.session_id = session_id
    turn = await open_turn(service, caller, source, target, generation, prompt, request=record)
    headers = {} if session_id is None else {"X-Session-ID": session_id}
    if isinstance(turn, Replay):
        headers["Idempotent-Replayed"] = "true"
        size = len(turn.body)
        return await service.texts.run(size, shape_type.replay, turn.body, body, headers)
    echoes = isinstance(body, CompletionRequest) and bool(body.echo)
    try:
        answer = await service.texts.run(
            sum(len(choice.token_ids) for choice in turn.requests) if echoes else 0,
            Answer,
            turn,
            service.checkpoint.tokenizer,
            new_id(shape_type.id_prefix),
            num_per_prompt=generation.num_per_prompt,
            echoes=echoes,
            counts_usage=body.wants_usage_in_events,
            new_splitter=prompt.splitters(generation.thinks),
        )
    except BaseException:
        await turn.close(None, 0)
        raise
    shape = shape_type(service, body, answer)
    stream_keepalive_s = service.settings.stream_keepalive_s
    if body.resumable:
        stream = start_stream(service, caller.owner, turn, answer, shape)
        return stream.response(stream_keepalive_s, headers=headers | {"X-Stream-ID": answer.id})
    if body.stream:
        return EventStream(turn, answer, shape, stream_keepalive_s, headers)
    return await reply(request, turn, answer, shape, headers)


def _check_delivery(body: GenerationRequest) -> None:
    """Raises InvalidRequest for conflicting delivery options."""
    if body.stream_options is not None and not body.stream:
        raise NeedsStream("stream_options")
    if body.resumable and not body.stream:
        raise NeedsStream("resumable")
    if body.stream and body.num_generated_per_prompt > body.num_choices_per_prompt:
        raise InvalidRequest(
            "best_of cannot be streamed: the best choices are known only at the end",
            "best_of",
        )


def _session_id(body: GenerationRequest, given: SessionHeaders) -> str | None:
    """The session named by body or header. Raises InvalidRequest."""
    if None not in (body.session_id, given.session_id) and body.session_id != given.session_id:
        raise InvalidRequest("session_id and the header X-Session-ID differ", "session_id")
    session_id = given.session_id if body.session_id is None else body.session_id
    if session_id is None and body.expected_turn is not None:
        raise InvalidRequest("expected_turn needs a session", "expected_turn")
    if session_id is not None and body.num_generated_per_prompt > 1:
        wrong = "n" if body.num_choices_per_prompt > 1 else "best_of"
        raise InvalidRequest(f"with a session {wrong} must be 1", wrong)
    if session_id is not None and body.num_prompts > 1:
        raise InvalidRequest("a session's turn has exactly one prompt", "prompt")
    return session_id


def _identity(body: GenerationRequest) -> str:
    """The request that an Idempotency-Key identifies, without delivery options."""
    asked = body.model_dump_json(exclude=DELIVERY, exclude_none=True)
    return f"{type(body).__name__} {asked}"
