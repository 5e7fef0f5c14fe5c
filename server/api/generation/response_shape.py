"""Responses in OpenAI's format: one message with one text, and typed events."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from server.api.generation.answer import Answer, ChoiceDelta
from server.api.generation.shape import Shape
from server.api.probabilities import render_logprobs
from server.api.schemas.chat import TokenLogprob
from server.api.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputThoughts,
    OutputTokensDetails,
    ReasoningConfig,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    ResponseTextConfig,
    ResponseUsage,
    Status,
)
from server.api.service import Service
from server.api.sse import EventData, SSEFormat
from server.engine.messages import Token
from server.errors import Cancelled, LatentdError

DEFAULT_TEMPERATURE = DEFAULT_TOP_P = 1.0


class ResponseSSEFormat(SSEFormat):
    """Events are named after their types."""

    ends_with_done = False

    def name_of(self, piece: EventData) -> str:
        return piece.type if isinstance(piece, ResponseEvent) else "error"


class ResponseShape(Shape[ResponseRequest]):
    """`ResponseObject` and `ResponseEvent` objects."""

    format = ResponseSSEFormat()

    def __init__(
        self, service: Service, body: ResponseRequest, answer: Answer, first: ResponseObject
    ) -> None:
        """`first`: the response without output."""
        super().__init__(service, body, answer)
        self._first = first
        self._item_id = f"msg_{secrets.token_hex(16)}"
        self._thoughts_id = f"rs_{secrets.token_hex(16)}"
        self._has_thoughts = self._has_message = False
        """Whether their events were sent."""

        self._number = 0
        self._completed_at: int | None = None

    def opening(self) -> Iterator[ResponseEvent]:
        """The response, and its message before it has text; a message that may follow thoughts
        comes later."""
        yield self._event("response.created", response=self._first)
        yield self._event("response.in_progress", response=self._first)
        if not self.answer.choices[0].thinks:
            yield from self._open_message()

    def pieces(self, delta: ChoiceDelta) -> Iterator[ResponseEvent]:
        """New text; at the end, all of it."""
        if delta.thoughts:
            if not self._has_thoughts:
                yield from self._open_thoughts()
            yield self._thought_event("response.reasoning_text.delta", delta=delta.thoughts)
        tokens = delta.tokens[delta.num_thought :]
        if delta.text or tokens:
            if not self._has_message:
                yield from self._open_message()
            yield self._text_event(
                "response.output_text.delta", delta=delta.text, logprobs=self._logprobs(tokens)
            )
        if delta.reason is not None:
            if not self._has_message:
                yield from self._open_message()
            text = self._text()
            yield self._text_event(
                "response.output_text.done", text=text.text, logprobs=text.logprobs
            )
            yield self._text_event("response.content_part.done", part=text)
            yield self._event(
                "response.output_item.done", output_index=self._message_at, item=self._message()
            )

    def _open_thoughts(self) -> Iterator[ResponseEvent]:
        """The item of the thoughts, before it has text."""
        self._has_thoughts = True
        item = OutputReasoning(
            id=self._thoughts_id, type="reasoning", summary=[], content=[], status="in_progress"
        )
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = OutputThoughts(type="reasoning_text", text="")
        yield self._thought_event("response.content_part.added", part=part)

    def _open_message(self) -> Iterator[ResponseEvent]:
        """The end of the thoughts, if any, and the message, before it has text."""
        self._has_message = True
        if self._has_thoughts:
            item = self._reasoning()
            [part] = item.content
            yield self._thought_event("response.reasoning_text.done", text=part.text)
            yield self._thought_event("response.content_part.done", part=part)
            yield self._event("response.output_item.done", output_index=0, item=item)
        message = OutputMessage(
            id=self._item_id, type="message", status="in_progress", role="assistant", content=[]
        )
        yield self._event("response.output_item.added", output_index=self._message_at, item=message)
        empty = OutputText(type="output_text", text="", annotations=[], logprobs=[])
        yield self._text_event("response.content_part.added", part=empty)

    def closing(self) -> Iterator[ResponseEvent]:
        """The complete response."""
        whole = self.whole()
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self) -> ResponseObject:
        """The complete response."""
        self._completed_at = self._completed_at or int(time.time())
        details = None
        if self._status == "incomplete":
            details = IncompleteDetails(reason="max_output_tokens")
        fields = {
            "status": self._status,
            "completed_at": self._completed_at,
            "incomplete_details": details,
            "output": [*([self._reasoning()] if self._thoughts else []), self._message()],
            "usage": self._usage(),
        }
        timings = self.timings
        return self._first.model_copy(
            update=fields | ({} if timings is None else {"timings": timings})
        )

    def failed(self, error: LatentdError) -> ResponseObject:
        """The response after an error or a cancellation."""
        cancelled = isinstance(error, Cancelled)
        reason = ResponseError(code=error.code or "server_error", message=error.message)
        self._completed_at = self._completed_at or int(time.time())
        return self._first.model_copy(
            update={
                "status": "cancelled" if cancelled else "failed",
                "completed_at": self._completed_at,
                "error": None if cancelled else reason,
            }
        )

    def failure(self, error: LatentdError) -> ResponseEvent:
        """The event for an error."""
        return self._event("response.failed", response=self.failed(error))

    @property
    def _status(self) -> Status:
        return "incomplete" if self.answer.choices[0].reason == "length" else "completed"

    def _message(self) -> OutputMessage:
        return OutputMessage.model_validate(
            {
                "id": self._item_id,
                "type": "message",
                "status": self._status,
                "role": "assistant",
                "content": [self._text()],
            }
        )

    @property
    def _thoughts(self) -> list[str]:
        return self.answer.choices[0].thoughts

    @property
    def _message_at(self) -> int:
        """The message's index in the output."""
        return int(bool(self._thoughts))

    def _reasoning(self) -> OutputReasoning:
        is_cut = self._status == "incomplete" and not self.answer.choices[0].has_answer
        return OutputReasoning(
            id=self._thoughts_id,
            type="reasoning",
            summary=[],
            content=[OutputThoughts(type="reasoning_text", text="".join(self._thoughts))],
            status="incomplete" if is_cut else "completed",
        )

    def _text(self) -> OutputText:
        choice = self.answer.choices[0]
        return OutputText(
            type="output_text",
            text="".join(choice.text),
            annotations=[],
            logprobs=self._logprobs(choice.generated.tokens[choice.num_thought_reported :]),
        )

    def _logprobs(self, tokens: Sequence[Token]) -> list[TokenLogprob]:
        """Log-probabilities, if requested."""
        return render_logprobs(self.tokenizer, tokens) if self.body.includes_logprobs else []

    def _usage(self) -> ResponseUsage:
        usage = self.answer.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=self.answer.choices[0].num_thought
            ),
            total_tokens=usage.total_tokens,
        )

    def _text_event(self, kind: str, **fields: object) -> ResponseEvent:
        at = self._message_at
        place = {"item_id": self._item_id, "output_index": at, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _thought_event(self, kind: str, **fields: object) -> ResponseEvent:
        place = {"item_id": self._thoughts_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: object) -> ResponseEvent:
        number, self._number = self._number, self._number + 1
        return ResponseEvent.model_validate({"type": kind, "sequence_number": number} | fields)


def first_object(service: Service, body: ResponseRequest, response_id: str) -> ResponseObject:
    """The response without output."""
    given: dict[str, Any] = {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": service.model_name,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": body.previous_response_id,
        "service_tier": body.reported_tier,
        "store": body.stores,
        "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        "text": ResponseTextConfig(format=body.reported_format),
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": DEFAULT_TOP_P if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "reasoning": None
        if body.effort is None
        else ReasoningConfig(effort=body.effort, summary=None),
        "max_tool_calls": None,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
    return ResponseObject.model_validate(given)
