"""A turn's events as a response in OpenAI's shape: one message with one text, and typed events."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from server.api.answers import Answer
from server.api.probabilities import told_tokens
from server.api.schemas.chat import TokenLogprob
from server.api.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    Status,
    ToldFormat,
)
from server.api.service import Service
from server.api.sse import Message
from server.api.turns import ChoiceSpec, Told, Turn
from server.engine.messages import Finished, PromptScored
from server.errors import Cancelled, LatentdError

DEFAULT_TEMPERATURE = DEFAULT_TOP_P = 1.0


class ResponseAnswer(Answer):
    """A response that is being made."""

    def __init__(
        self,
        service: Service,
        body: ResponseRequest,
        turn: Turn,
        specs: Sequence[ChoiceSpec],
        first: ResponseObject,
    ) -> None:
        """`first` is the response before it has any output."""
        super().__init__(service, body, turn, specs, answer_id=first.id)
        self._asked = body
        self._item_id = f"msg_{secrets.token_hex(16)}"
        self._number = 0
        self._completed_at: int | None = None
        self._first = first

    def opening(self) -> Iterator[ResponseEvent]:
        """The response and its message before they have any text."""
        yield self._event("response.created", response=self._first)
        yield self._event("response.in_progress", response=self._first)
        item = OutputMessage(
            id=self._item_id, type="message", status="in_progress", role="assistant", content=[]
        )
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = OutputText(type="output_text", text="", annotations=[], logprobs=[])
        yield self._text_event("response.content_part.added", part=part)

    def pieces(self, index: int, event: Told) -> Iterator[ResponseEvent]:
        """New text; at the end, the whole of it."""
        del index  # there is one choice
        if isinstance(event, PromptScored):
            return
        if event.text or event.tokens:
            logprobs = self._logprobs(len(event.tokens))
            yield self._text_event(
                "response.output_text.delta", delta=event.text, logprobs=logprobs
            )
        if isinstance(event, Finished):
            text = self._text()
            yield self._text_event(
                "response.output_text.done", text=text.text, logprobs=text.logprobs
            )
            yield self._text_event("response.content_part.done", part=text)
            yield self._event("response.output_item.done", output_index=0, item=self._message())

    def closing(self) -> Iterator[ResponseEvent]:
        """The whole response."""
        whole = self.whole()
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self) -> ResponseObject:
        self._completed_at = self._completed_at or int(time.time())
        details = None
        if self._status == "incomplete":
            details = IncompleteDetails(reason="max_output_tokens")
        facts = {
            "status": self._status,
            "completed_at": self._completed_at,
            "incomplete_details": details,
            "output": [self._message()],
            "usage": self._response_usage(),
        }
        told = {} if self.timings is None else {"timings": self.timings}
        return self._first.model_copy(update=facts | told)

    def failure(self, error: LatentdError) -> ResponseEvent:
        """The event for an error that ends it."""
        return self._event("response.failed", response=self.failed(error))

    def failed(self, error: LatentdError) -> ResponseObject:
        """What it becomes by an error."""
        return failed_object(self._first, error)

    @property
    def _status(self) -> Status:
        return "incomplete" if self.choices[0].reason == "length" else "completed"

    def _message(self) -> OutputMessage:
        status = "incomplete" if self._status == "incomplete" else "completed"
        return OutputMessage.model_validate(
            {
                "id": self._item_id,
                "type": "message",
                "status": status,
                "role": "assistant",
                "content": [self._text()],
            }
        )

    def _text(self) -> OutputText:
        choice = self.choices[0]
        return OutputText(
            type="output_text",
            text="".join(choice.text),
            annotations=[],
            logprobs=self._logprobs(len(choice.generated.tokens)),
        )

    def _logprobs(self, num_new: int) -> list[TokenLogprob]:
        """Of the last `num_new` tokens, if asked for."""
        if not self._asked.include:
            return []
        tokens = self.choices[0].generated.tokens
        return told_tokens(self.tokenizer, tokens[len(tokens) - num_new :])

    def _response_usage(self) -> ResponseUsage:
        usage = self.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
            total_tokens=usage.total_tokens,
        )

    def _text_event(self, kind: str, **facts: object) -> ResponseEvent:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **facts)

    def _event(self, kind: str, **facts: object) -> ResponseEvent:
        number, self._number = self._number, self._number + 1
        return ResponseEvent.model_validate({"type": kind, "sequence_number": number} | facts)


def first_object(
    service: Service, body: ResponseRequest, response_id: str, created: int
) -> ResponseObject:
    """The response before it has any output."""
    given: dict[str, Any] = {
        "id": response_id,
        "object": "response",
        "created_at": created,
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
        "service_tier": "default",
        "store": body.stores,
        "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        "text": ToldFormat(format=body.told_format),
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": DEFAULT_TOP_P if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
    return ResponseObject.model_validate(given)


def failed_object(first: ResponseObject, error: LatentdError) -> ResponseObject:
    """What a response becomes by an error, or by being cancelled."""
    cancelled = isinstance(error, Cancelled)
    told = ResponseError(code=error.code or "server_error", message=error.message)
    return first.model_copy(
        update={
            "status": "cancelled" if cancelled else "failed",
            "completed_at": int(time.time()),
            "error": None if cancelled else told,
        }
    )


def kind_of(message: Message) -> str:
    """The name of an event."""
    return message.type if isinstance(message, ResponseEvent) else "error"
