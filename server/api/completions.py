"""`POST /v1/completions`: text that continues a prompt, whole or as a stream."""

from fastapi import APIRouter, Request, Response

from server.api.auth import CallerDep
from server.api.bodies import JSONRoute
from server.api.generation.completion_shape import CompletionShape
from server.api.generation.prompts import TextPrompt
from server.api.generation.session_turn import ANSWER_HEADERS_DOC, SessionHeaders, answer_turn
from server.api.parameters import IdempotencyKey, SessionHeader
from server.api.refusals import BODY, GUARDED, TURN, refusals
from server.api.schemas.completions import Completion, CompletionRequest
from server.api.service import ServiceDep
from server.api.sse import events_of
from server.errors import InvalidRequest

router = APIRouter(route_class=JSONRoute, tags=["completions"], responses=refusals(*GUARDED))


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=refusals(*BODY, 409, *TURN)
    | {200: {"headers": ANSWER_HEADERS_DOC} | events_of("Completion")},
)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    x_session_id: SessionHeader = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Continue a prompt. With a session, continue what it has read and written so far.

    A session's turn is committed before its last event; otherwise the session remains unchanged.
    With an `Idempotency-Key`, a committed turn is not run again: the same request gets the same
    answer, for as long as the turn's checkpoint is stored. Without a session the key has no effect.
    """
    if body.best_of is not None and body.best_of < body.num_choices_per_prompt:
        raise InvalidRequest(
            f"best_of is {body.best_of}, the minimum is n, {body.num_choices_per_prompt}", "best_of"
        )
    given = SessionHeaders(x_session_id, idempotency_key)
    prompt = TextPrompt(service, body.prompts)
    return await answer_turn(request, service, caller, body, given, prompt, CompletionShape)
