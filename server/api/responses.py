"""`/v1/responses`: answers that are kept, each with the state after it, to go on from any."""

import asyncio
import logging
import time

from fastapi import APIRouter, Request, Response

from server.api import prompts
from server.api.answers import TIMINGS_TOLD, timing_headers
from server.api.auth import Caller, CallerDep, OwnerDep
from server.api.conversation import Said
from server.api.exchange import CLIENT_CLOSED_REQUEST, unless_disconnected
from server.api.parameters import ResponseId, StartingAfter, WantsStream
from server.api.refusals import GUARDED, JSON, STORED, TURN, WRITTEN, refusals
from server.api.response_answer import ResponseAnswer, first_object, kind_of
from server.api.schemas.responses import (
    ResponseDeleted,
    ResponseObject,
    ResponseRequest,
)
from server.api.service import Service, ServiceDep
from server.api.sse import EventStream, Manner, Messages, events_of
from server.api.turns import Turn
from server.errors import (
    Cancelled,
    InvalidRequest,
    LatentdError,
    NeedsStream,
    NotFound,
    StorageFailed,
)

log = logging.getLogger(__name__)
router = APIRouter(
    prefix="/v1/responses",
    tags=["responses"],
    responses=refusals(*GUARDED),
)


@router.post(
    "",
    response_model=ResponseObject,
    responses=refusals(*JSON, *TURN) | {200: TIMINGS_TOLD | events_of("ResponseEvent")},
)
async def create_response(
    body: ResponseRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """Answer an input, or go on from an earlier response, whatever has gone on from there already.

    A stored response is durable before its last event, with the state after it: going on from it
    costs the copy of one state of fixed size, and reads nothing of the past again.
    """
    making = _Making(service, caller, body)
    await making.begin()
    if body.background:
        stream = service.streams.start(
            caller.owner, making.id, making.messages(), making.close, making.manner
        )
        if body.stream:
            return stream.response(service.settings.keepalive_s, headers={})
        return _json(making.first_json)
    if body.stream:
        return EventStream(making.messages(), making.close, {}, making.manner)
    try:
        complete = await unless_disconnected(request, making.turn)
    finally:
        await asyncio.shield(making.close())
    if not complete:
        request.scope["latentd.outcome"] = "cancelled"
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return _json(making.answer.to_json(), timing_headers(making.answer.timings))


@router.get(
    "/{response_id}",
    response_model=ResponseObject,
    responses=refusals(400, 410, *STORED) | {200: events_of("ResponseEvent")},
)
async def get_response(
    response_id: ResponseId,
    service: ServiceDep,
    owner: OwnerDep,
    stream: WantsStream = False,
    starting_after: StartingAfter = None,
) -> Response:
    """A stored response.

    With `stream`, the events of one in the background, those to come included; with
    `starting_after`, those behind the event of that number.
    """
    if not stream and starting_after is not None:
        raise InvalidRequest("starting_after needs stream=true", "starting_after")
    record = await service.responses.get(owner, response_id)
    if not stream:
        return _json(record.body)
    try:
        found = service.streams.get(owner, response_id)
    except NotFound as error:
        raise InvalidRequest(
            f"the events of response {response_id} are not kept: those of one in the background "
            f"are, for {service.settings.stream_ttl_s:g} seconds after its end",
            "stream",
            "events_gone",
        ) from error
    start = 0 if starting_after is None else starting_after + 1
    return found.response(service.settings.keepalive_s, start=start, headers={})


@router.post(
    "/{response_id}/cancel",
    response_model=ResponseObject,
    responses=refusals(400, *STORED, *WRITTEN),
)
async def cancel_response(
    response_id: ResponseId, service: ServiceDep, owner: OwnerDep
) -> Response:
    """End a response in the background: nothing can go on from it.

    One that has ended stays as it is.
    """
    record = await service.responses.get(owner, response_id)
    if not ResponseObject.model_validate_json(record.body).background:
        raise InvalidRequest(
            "only a response in the background can be cancelled; any other ends with its "
            "connection",
            "response_id",
            "response_not_in_background",
        )
    await _cancel(service, owner, response_id)
    return _json((await service.responses.get(owner, response_id)).body)


@router.delete("/{response_id}", responses=refusals(*STORED, *WRITTEN))
async def delete_response(
    response_id: ResponseId, service: ServiceDep, owner: OwnerDep
) -> ResponseDeleted:
    """Erase a response with its state, also one that is being made. What has gone on from it stays
    as it is."""
    await service.responses.delete(owner, response_id)
    await _cancel(service, owner, response_id)
    return ResponseDeleted(id=response_id)


class _Making:
    """The making of one response."""

    def __init__(self, service: Service, caller: Caller, body: ResponseRequest) -> None:
        """Raises InvalidRequest for what is wrong with the request alone, and RateLimited."""
        service.check_ready()
        prompts.check_model(service, body.model)
        prompts.check_limits(service, body)
        _check(body)
        self.id = service.responses.new_id()
        self.first = first_object(service, body, self.id, int(time.time()))
        self.turn = Turn(service, caller, prompts.timeout_s(service, body))
        self.answer: ResponseAnswer
        self._service = service
        self._owner = caller.owner
        self._body = body
        self._is_pending = False
        self._error: LatentdError = Cancelled()
        self.manner = Manner(
            lambda error: self.answer.failure(error), kind_of, ends_with_done=False
        )

    async def begin(self) -> None:
        """Submit the turn. One in the background is stored before that. Raises LatentdError."""
        try:
            if self._body.background:
                self._service.streams.check_room()
                await self._service.responses.create_pending(
                    self._owner, self.id, self.first_json, self._body.ttl
                )
                self._is_pending = True
            await self._submit()
        except BaseException:
            await asyncio.shield(self._abandon())
            raise

    async def messages(self) -> Messages:
        """The events of its stream."""
        yield list(self.answer.opening())
        try:
            async for happened in self.turn.events(self._service.settings.keepalive_s):
                if happened is None:
                    yield None
                else:
                    yield [event for told in happened for event in self.answer.pieces(*told)]
        except LatentdError as error:
            self._error = error
            raise
        yield list(self.answer.closing())

    async def close(self) -> None:
        """End the turn. What is in the background and has not been stored is told as failed, or
        as cancelled."""
        if self._is_pending:
            ended = self.answer.failed(self._error).model_dump_json(exclude_unset=True)
            try:
                await self._service.responses.finish_without_state(self._owner, self.id, ended)
            except StorageFailed as error:  # it is told as interrupted as soon as the disk permits
                log.warning("the end of a response cannot be stored: %s", error)
        await self.turn.close()

    async def _submit(self) -> None:
        service, body, turn = self._service, self._body, self.turn
        if body.stores:
            await turn.branch(body.previous_response_id, self.id, body.ttl)
        elif body.previous_response_id is not None:
            turn.start_from(
                await service.responses.state_after(self._owner, body.previous_response_id)
            )
        said = [Said(role, text) for role, text in body.messages]
        tokens = await prompts.read_messages(service, said, turn.start, body.prompt_name)
        prompts.check_lengths(service, body, [tokens], turn.start)
        specs = await prompts.choices(service, body, [tokens])
        self.answer = ResponseAnswer(service, body, turn, specs, self.first)
        await turn.submit(specs, self.answer)

    async def _abandon(self) -> None:
        """It has not begun: nobody knows its id."""
        try:
            if self._is_pending:
                await self._service.responses.delete(self._owner, self.id)
        except LatentdError as error:
            log.warning("a response that has not begun stays in the store: %s", error)
        finally:
            await self.turn.close()

    @property
    def first_json(self) -> str:
        """The response before it has any output."""
        return self.first.model_dump_json(exclude_unset=True)


def _check(body: ResponseRequest) -> None:
    """Raises InvalidRequest for parameters that go ill together."""
    if body.top_logprobs is not None and not body.include:
        raise InvalidRequest(
            "top_logprobs needs include: ['message.output_text.logprobs']", "top_logprobs"
        )
    if body.background and not body.stores:
        raise InvalidRequest("a response in the background is stored", "store")
    if body.ttl is not None and not body.stores:
        raise InvalidRequest("ttl is for responses that are stored", "ttl")
    if body.stream_options is not None and not body.stream:
        raise NeedsStream("stream_options")


async def _cancel(service: Service, owner: str, response_id: str) -> None:
    """End its turn, if it runs in the background."""
    try:
        stream = service.streams.get(owner, response_id)
    except NotFound:
        return
    await stream.cancel()


def _json(body: str, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)
