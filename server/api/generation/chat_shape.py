"""Chat completions in OpenAI's format."""

from collections.abc import Iterable, Iterator, Sequence

from server.api.generation.answer import Choice, ChoiceDelta
from server.api.generation.shape import TurnShape, usage_fields
from server.api.probabilities import render_logprobs
from server.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    MessageDelta,
)
from server.api.schemas.generation import Usage
from server.api.sse import EventData
from server.engine.messages import Token

OBJECT = {"object": "chat.completion.chunk"}


class ChatShape(TurnShape[ChatRequest]):
    """`ChatCompletion` and `ChatChunk` objects."""

    id_prefix = "chatcmpl"

    def opening(self) -> Iterator[ChatChunk]:
        """The role of each choice."""
        for index in range(len(self.answer.choices)):
            first = self._prompt_ids() if not index else {}
            delta = MessageDelta(role="assistant", content="")
            yield self._chunk(index, delta, {}, self._usage, first)

    def pieces(self, delta: ChoiceDelta) -> Iterable[EventData]:
        """At most one event for the text, and one for the end."""
        if delta.is_prompt:
            return []
        if not self._is_plain or delta.reason is not None:
            return self._full_pieces(delta)
        parts = ((delta.thoughts, self._thought_chunk), (delta.text, self._text_chunk))
        return [self.render_text(delta.choice, text, make) for text, make in parts if text]

    def closing(self) -> Iterator[ChatChunk]:
        """The usage, if requested."""
        if self.body.wants_usage_event:
            yield ChatChunk.model_validate(
                self.facts | OBJECT | {"choices": [], "usage": self.answer.usage}
            )

    def whole(self) -> ChatCompletion:
        """All choices."""
        choices = [self._whole_choice(*numbered) for numbered in enumerate(self.answer.choices)]
        return ChatCompletion.model_validate(
            self.facts
            | self._prompt_ids()
            | {
                "object": "chat.completion",
                "choices": choices,
                "service_tier": self.body.reported_tier,
                "usage": self.answer.usage,
                "session_id": self.answer.session_id,
                "session_turn": self.answer.session_turn,
            }
        )

    @classmethod
    def replay_pieces(cls, known: str, body: ChatRequest) -> Iterator[ChatChunk]:
        """One event per choice, with all of its text."""
        answer = ChatCompletion.model_validate_json(known)
        facts = answer.model_dump(exclude={"choices", "usage", "object"}, exclude_unset=True)
        facts |= OBJECT
        for choice in answer.choices:
            fields = choice.model_dump(exclude={"message"}, exclude_unset=True)
            message = choice.message.model_dump(
                include={"content", "reasoning_content"}, exclude_unset=True
            )
            delta = MessageDelta(role="assistant", **message)
            yield ChatChunk.model_validate(
                facts
                | usage_fields(body, answer.usage)
                | {"choices": [ChatChunkChoice(**fields, delta=delta)]}
            )
        if body.wants_usage_event:
            yield ChatChunk(**facts, choices=[], usage=answer.usage)

    def _full_pieces(self, delta: ChoiceDelta) -> Iterator[ChatChunk]:
        if delta.text or delta.thoughts or delta.tokens:
            fields = self._token_fields(delta.tokens)
            new = {"reasoning_content": delta.thoughts} if delta.thoughts else {}
            if delta.text or not delta.thoughts:
                new["content"] = delta.text
            yield self._chunk(delta.choice, MessageDelta(**new), fields, delta.usage)
        if delta.reason is not None:
            end: dict[str, object] = {
                "stop_reason": delta.stopped_by,
                "finish_reason": delta.reason,
            }
            yield self._chunk(delta.choice, MessageDelta(), end, delta.usage)

    def _whole_choice(self, index: int, choice: Choice) -> ChatChoice:
        text = "".join(choice.text)
        thoughts = {"reasoning_content": "".join(choice.thoughts)} if choice.thoughts else {}
        message = AssistantMessage(
            role="assistant", content=text, refusal=None, annotations=[], **thoughts
        )
        return ChatChoice.model_validate(
            {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": choice.reason,
                "stop_reason": choice.stopped_by,
            }
            | self._token_fields(choice.generated.tokens)
        )

    def _text_chunk(self, index: int, text: str) -> ChatChunk:
        """An event with only text."""
        return self._chunk(index, MessageDelta(content=text), {}, None)

    def _thought_chunk(self, index: int, text: str) -> ChatChunk:
        """An event with thoughts and nothing else."""
        return self._chunk(index, MessageDelta(reasoning_content=text), {}, None)

    def _chunk(
        self,
        index: int,
        delta: MessageDelta,
        fields: dict[str, object],
        usage: Usage | None,
        first: dict[str, object] | None = None,
    ) -> ChatChunk:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | fields
        return ChatChunk.model_validate(
            self.facts
            | usage_fields(self.body, usage)
            | (first or {})
            | OBJECT
            | {"choices": [choice]}
        )

    def _prompt_ids(self) -> dict[str, object]:
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.answer.choices[0].prompt_ids)}

    def _token_fields(self, tokens: Sequence[Token]) -> dict[str, object]:
        """The requested details of these tokens."""
        fields: dict[str, object] = {}
        if self.body.logprobs:
            content = render_logprobs(self.tokenizer, tokens)
            fields["logprobs"] = ChatLogprobs(content=content, refusal=None)
        if self.body.return_token_ids:
            fields["token_ids"] = [token.token_id for token in tokens]
        return fields
