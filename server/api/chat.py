"""`POST /v1/chat/completions`: an answer to a conversation, whole or as a stream."""

from fastapi import APIRouter, Request, Response

from server.api.auth import CallerDep
from server.api.bodies import JSONRoute
from server.api.generation.chat_shape import ChatShape
from server.api.generation.prompts import ChatPrompt, chat_messages
from server.api.generation.session_turn import ANSWER_HEADERS_DOC, SessionHeaders, answer_turn
from server.api.parameters import IdempotencyKey, SessionHeader
from server.api.refusals import BODY, GUARDED, TURN, refusals
from server.api.schemas.chat import ChatCompletion, ChatRequest
from server.api.service import ServiceDep
from server.api.sse import events_of
from server.errors import InvalidRequest

router = APIRouter(route_class=JSONRoute, tags=["chat"], responses=refusals(*GUARDED))


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=refusals(*BODY, 409, *TURN)
    | {200: {"headers": ANSWER_HEADERS_DOC} | events_of("ChatChunk")},
)
async def create_chat_completion(
    body: ChatRequest,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    x_session_id: SessionHeader = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Answer a conversation. With a session, send only the messages since its last turn.

    The session continues as if the whole conversation had been sent again. Turns have the same
    guarantees as those of `/v1/completions`: atomic, conditional, and repeatable with an
    `Idempotency-Key`.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    prompt = ChatPrompt(service, chat_messages(body.messages), body.prompt_name)
    given = SessionHeaders(x_session_id, idempotency_key)
    return await answer_turn(request, service, caller, body, given, prompt, ChatShape)
