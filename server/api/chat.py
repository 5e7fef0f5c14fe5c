"""`POST /v1/chat/completions`: an answer to a conversation, whole or as a stream."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from fastapi import APIRouter, Request, Response

from server.api import prompts
from server.api.answers import Answer, Choice, new_id
from server.api.auth import CallerDep
from server.api.exchange import TOLD, Exchange, Prepared, SessionHeaders
from server.api.parameters import IdempotencyKey, SessionHeader
from server.api.probabilities import told_tokens
from server.api.refusals import GUARDED, JSON, TURN, refusals
from server.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
)
from server.api.service import Service, ServiceDep
from server.api.sse import Message, events_of
from server.api.turns import ChoiceSpec, Told, Turn
from server.engine.messages import Finished, PromptScored, TextDelta
from server.errors import InvalidRequest

router = APIRouter(tags=["chat"], responses=refusals(*GUARDED))


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=refusals(*JSON, 409, *TURN) | {200: TOLD | events_of("ChatChunk")},
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

    The session goes on as if the whole conversation had been sent again. What holds for turns of
    `/v1/completions` holds here: atomic, conditional, repeatable with an `Idempotency-Key`.
    """

    async def prepare(turn: Turn) -> Prepared:
        said = prompts.said(body.messages)
        tokens = await prompts.read_messages(service, said, turn.start, body.prompt_name)
        prompts.check_lengths(service, body, [tokens], turn.start)
        specs = await prompts.choices(service, body, [tokens])
        return Prepared(specs, ChatAnswer(service, body, turn, specs))

    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    given = SessionHeaders(x_session_id, idempotency_key)
    return await Exchange(request, service, caller, body, given).answer(
        prepare, lambda known: _again(known, body)
    )


class ChatAnswer(Answer):
    """A chat completion in OpenAI's shape."""

    def __init__(
        self, service: Service, body: ChatRequest, turn: Turn, specs: Sequence[ChoiceSpec]
    ) -> None:
        super().__init__(service, body, turn, specs, answer_id=new_id("chatcmpl"))
        self._asked = body
        self._is_plain = (
            not body.logprobs and not body.return_token_ids and not body.wants_usage_in_events
        )

    def opening(self) -> Iterator[ChatChunk]:
        """The role of each choice."""
        for index in range(len(self.choices)):
            yield self._chunk(index, Delta(role="assistant", content=""), {}, first=not index)

    def pieces(self, index: int, event: Told) -> Iterable[Message]:
        """At most one event for a text, and one for its end."""
        if not self._is_plain or not isinstance(event, TextDelta):
            return self._full_pieces(index, event)
        return [self._rendered(index, event.text, self._text_chunk)] if event.text else []

    def _full_pieces(self, index: int, event: Told) -> Iterator[ChatChunk]:
        if isinstance(event, PromptScored):
            return
        if event.text or event.tokens:
            told = self._told(self.choices[index], len(event.tokens))
            yield self._chunk(index, Delta(content=event.text), told)
        if isinstance(event, Finished):
            yield self._chunk(index, Delta(), {"stop_reason": event.stopped_by}, event.reason)

    def closing(self) -> Iterator[ChatChunk]:
        """The usage, if asked for."""
        if self._asked.wants_usage_event:
            yield ChatChunk.model_validate(
                self.facts | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage}
            )

    def whole(self) -> ChatCompletion:
        choices = [self._whole_choice(*numbered) for numbered in enumerate(self.choices)]
        return ChatCompletion.model_validate(
            self.facts
            | self._prompt_ids()
            | {
                "object": "chat.completion",
                "choices": choices,
                "service_tier": "default",
                "usage": self.usage,
                "session_id": self.session_id,
                "session_turn": self.session_turn,
            }
        )

    def _whole_choice(self, index: int, choice: Choice) -> ChatChoice:
        return ChatChoice.model_validate(
            {
                "index": index,
                "message": AssistantMessage(
                    role="assistant", content="".join(choice.text), refusal=None
                ),
                "logprobs": None,
                "finish_reason": choice.reason,
                "stop_reason": choice.stopped_by,
            }
            | self._told(choice, len(choice.generated.tokens))
        )

    def _text_chunk(self, index: int, text: str) -> ChatChunk:
        """An event that tells a text and nothing else."""
        return self._chunk(index, Delta(content=text), {})

    def _chunk(
        self,
        index: int,
        delta: Delta,
        told: dict[str, object],
        reason: Literal["stop", "length"] | None = None,
        *,
        first: bool = False,
    ) -> ChatChunk:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason} | told
        return ChatChunk.model_validate(
            self.facts
            | self._asked.usage_in_event(lambda: self.usage)
            | (self._prompt_ids() if first else {})
            | {"object": "chat.completion.chunk", "choices": [choice]}
        )

    def _prompt_ids(self) -> dict[str, object]:
        if not self._asked.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.choices[0].prompt_ids)}

    def _told(self, choice: Choice, num_new: int) -> dict[str, object]:
        """What was asked for about the last `num_new` tokens of a choice."""
        facts: dict[str, object] = {}
        tokens = choice.generated.tokens
        new = tokens[len(tokens) - num_new :]
        if self._asked.logprobs:
            facts["logprobs"] = ChatLogprobs(content=told_tokens(self.tokenizer, new), refusal=None)
        if self._asked.return_token_ids:
            facts["token_ids"] = [token.token_id for token in new]
        return facts


def _again(answer: str, body: ChatRequest) -> Iterator[ChatChunk]:
    """A known answer as a stream."""
    known = ChatCompletion.model_validate_json(answer)
    facts = known.model_dump(exclude={"choices", "usage", "object"}, exclude_unset=True)
    usage = body.usage_in_event(lambda: known.usage)
    for choice in known.choices:
        told = choice.model_dump(exclude={"message"}, exclude_unset=True)
        delta = Delta(role="assistant", content=choice.message.content)
        yield ChatChunk.model_validate(
            facts
            | usage
            | {
                "object": "chat.completion.chunk",
                "choices": [ChatChunkChoice(**told, delta=delta)],
            }
        )
    if body.wants_usage_event:
        yield ChatChunk(**facts, object="chat.completion.chunk", choices=[], usage=known.usage)
