"""`/v1/responses`: stored answers, each with the state after it, to continue from."""

from fastapi import APIRouter, Request, Response

from server.api.auth import CallerDep, OwnerDep
from server.api.bodies import JSONRoute
from server.api.conversation import ChatMessage
from server.api.generation.answer import Answer
from server.api.generation.deliver import EventStream, reply
from server.api.generation.detached import start_stream
from server.api.generation.generation import read_generation
from server.api.generation.prompts import ChatPrompt
from server.api.generation.response_shape import ResponseShape, first_object
from server.api.generation.session_turn import TIMING_HEADERS_DOC
from server.api.generation.turn import Replay, open_turn
from server.api.held import hold
from server.api.parameters import (
    IncludeObfuscation,
    LastEventId,
    ResponseId,
    StartingAfter,
    WantsStream,
)
from server.api.problems import record_of
from server.api.refusals import BODY, GUARDED, STORED, TURN, WRITTEN, refusals
from server.api.schemas.generation import NO_PADDING
from server.api.schemas.responses import (
    ResponseDeleted,
    ResponseObject,
    ResponseRequest,
)
from server.api.service import Service, ServiceDep
from server.api.sse import AT_END, events_of
from server.api.texts import LONG
from server.errors import InternalError, InvalidRequest, NeedsStream, NotFound
from server.sessions.ledger import AfterResponse, NewResponse, new_response_id

router = APIRouter(
    route_class=JSONRoute,
    prefix="/v1/responses",
    tags=["responses"],
    responses=refusals(*GUARDED),
)


@router.post(
    "",
    response_model=ResponseObject,
    responses=refusals(*BODY, *TURN)
    | {200: {"headers": TIMING_HEADERS_DOC} | events_of("ResponseEvent")},
)
async def create_response(
    body: ResponseRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """Answer an input, or continue an earlier response, even one that was continued before.

    A stored response is durable before its last event, with the state after it: continuing it
    copies one state of fixed size and re-reads nothing.
    """
    _check(body)
    generation = await read_generation(
        service, body, caller=caller, is_detached=bool(body.background)
    )
    first = first_object(service, body, new_response_id())
    first_json = first.model_dump_json(exclude_unset=True)
    source = None if body.previous_response_id is None else AfterResponse(body.previous_response_id)
    target = NewResponse(first.id, body.ttl) if body.stores else None
    prompt = ChatPrompt(
        service,
        [ChatMessage(*message[:2], thoughts=message[2]) for message in body.messages],
        body.prompt_name,
    )
    pending = first_json if body.background else None
    record = record_of(request.scope)
    record.streams = bool(body.stream)
    turn = await open_turn(service, caller, source, target, generation, prompt, pending, record)
    if isinstance(turn, Replay):
        raise InternalError("a new response has no answer to replay")
    splitters = prompt.splitters(generation.thinks)
    answer = Answer(turn, service.checkpoint.tokenizer, first.id, new_splitter=splitters)
    shape = ResponseShape(service, body, answer, first)
    stream_keepalive_s = service.settings.stream_keepalive_s
    if body.background:
        stream = start_stream(service, caller.owner, turn, answer, shape)
        return stream.response(stream_keepalive_s) if body.stream else _json(first_json)
    if body.stream:
        return EventStream(turn, answer, shape, stream_keepalive_s, {})
    return await reply(request, turn, answer, shape, {})


@router.get(
    "/{response_id}",
    response_model=ResponseObject,
    responses=refusals(400, 410, 429, *STORED) | AT_END | {200: events_of("ResponseEvent")},
)
async def get_response(
    response_id: ResponseId,
    service: ServiceDep,
    caller: CallerDep,
    stream: WantsStream = False,
    starting_after: StartingAfter = None,
    include_obfuscation: IncludeObfuscation = False,
    last_event_id: LastEventId = None,
) -> Response:
    """Get a stored response.

    With `stream`, stream the events of a background response, past and future; with
    `starting_after` or `Last-Event-ID`, those after that event.
    """
    if include_obfuscation:
        raise InvalidRequest(NO_PADDING, "include_obfuscation", "unsupported_parameter")
    if not stream and starting_after is not None:
        raise InvalidRequest("starting_after needs stream=true", "starting_after")
    record = await service.ledger.get(caller.owner, "response", response_id)
    if not stream:
        body = record.body or ""
        if len(body) > LONG:
            await service.limiter.count(caller)
            hold(len(body))
        return _json(body)
    try:
        found = service.streams.get(caller.owner, response_id)
    except NotFound as error:
        raise InvalidRequest(
            f"the events of response {response_id} are not available: only those of background "
            f"responses are, until {service.settings.stream_ttl_s:g} seconds after their end",
            "stream",
            "events_gone",
        ) from error
    if last_event_id is not None:  # sent by a client that reconnects
        start = found.number_after(last_event_id)
    else:
        start = 0 if starting_after is None else starting_after + 1
    return found.response(service.settings.stream_keepalive_s, start=start)


@router.post(
    "/{response_id}/cancel",
    response_model=ResponseObject,
    responses=refusals(400, *STORED, *WRITTEN),
)
async def cancel_response(
    response_id: ResponseId, service: ServiceDep, owner: OwnerDep
) -> Response:
    """Cancel a background response; it cannot be continued.

    A finished response is returned unchanged.
    """
    record = await service.ledger.get(owner, "response", response_id)
    body = record.body or ""
    parse = ResponseObject.model_validate_json
    if not (await service.texts.run(len(body), parse, body)).background:
        raise InvalidRequest(
            "only a background response can be cancelled; any other ends with its connection",
            "response_id",
            "response_not_in_background",
        )
    await _cancel(service, owner, response_id)
    return _json((await service.ledger.get(owner, "response", response_id)).body or "")


@router.delete("/{response_id}", responses=refusals(*STORED, *WRITTEN))
async def delete_response(
    response_id: ResponseId, service: ServiceDep, owner: OwnerDep
) -> ResponseDeleted:
    """Erase a response with its state, even while it is being generated. Responses continued from
    it are not affected."""
    await service.ledger.delete(owner, "response", response_id)
    await _cancel(service, owner, response_id)
    return ResponseDeleted(id=response_id)


def _check(body: ResponseRequest) -> None:
    """Raises InvalidRequest for conflicting parameters."""
    if body.top_logprobs is not None and not body.includes_logprobs:
        raise InvalidRequest(
            "top_logprobs needs include: ['message.output_text.logprobs']", "top_logprobs"
        )
    if body.background and not body.stores:
        raise InvalidRequest("background needs store: true", "store")
    if body.ttl is not None and not body.stores:
        raise InvalidRequest("ttl needs store: true", "ttl")
    if body.stream_options is not None and not body.stream:
        raise NeedsStream("stream_options")


async def _cancel(service: Service, owner: str, response_id: str) -> None:
    """Cancel its turn, if it runs in the background."""
    try:
        stream = service.streams.get(owner, response_id)
    except NotFound:
        return
    await stream.cancel()


def _json(body: str) -> Response:
    return Response(body, media_type="application/json")
