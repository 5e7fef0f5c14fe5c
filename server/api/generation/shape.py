"""Shapes: rendering of answers, as a whole and as events of a stream."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import Response
from pydantic import BaseModel

from server.api.generation.answer import Answer, ChoiceDelta
from server.api.schemas.generation import GenerationRequest, SamplingRequest, Timings, Usage
from server.api.service import Service
from server.api.sse import (
    DONE,
    EVENT_STREAM,
    NO_BUFFERING,
    EventData,
    SSEFormat,
    encode_event,
    error_piece,
)
from server.api.templates import TextTemplate
from server.api.texts import dump_json
from server.errors import LatentdError

BodyT = TypeVar("BodyT", bound=SamplingRequest)
Turned = TypeVar("Turned", bound=GenerationRequest)


class Shape(Generic[BodyT]):
    """Base class that renders nothing. Keeps no state except caches."""

    format = SSEFormat()

    def __init__(self, service: Service, body: BodyT, answer: Answer) -> None:
        self.answer = answer
        self.body = body
        self.tokenizer = service.checkpoint.tokenizer
        self._templates: dict[tuple[int, str], TextTemplate] = {}
        """By choice and the name of the method: the method itself would keep the shape alive."""

        self._json: str | None = None
        self._constant: dict[str, Any] = {
            "id": answer.id,
            "created": answer.created,
            "model": service.model_name,
            "system_fingerprint": f"fp_{service.checkpoint.fingerprint[:12]}",
        } | ({} if answer.session_id is None else {"session_id": answer.session_id})

    def opening(self) -> Iterable[EventData]:
        """Initial events of a stream."""
        return ()

    def pieces(self, delta: ChoiceDelta) -> Iterable[EventData]:
        """Events for new text."""
        del delta
        return ()

    def closing(self) -> Iterable[EventData]:
        """Final events of a stream."""
        return ()

    def whole(self) -> BaseModel | None:
        """The complete answer."""
        return None

    def failed(self, error: LatentdError) -> BaseModel | None:
        """What to store instead of the answer after an error."""
        del error
        return None

    def failure(self, error: LatentdError) -> EventData:
        """The event for an error."""
        return error_piece(error)

    def to_json(self) -> str:
        """`whole` as JSON; cached, for both storing and sending."""
        if self._json is None:
            self._json = as_json(self.whole()) or ""
        return self._json

    @property
    def timings(self) -> Timings | None:
        """Timings, if requested and all choices have finished."""
        return self.answer.timings if self.body.timings else None

    @property
    def facts(self) -> dict[str, Any]:
        """Fields common to the answer and all of its events."""
        if not self.answer.is_finished:
            return self._constant
        known = {"session_turn": self.answer.session_turn, "timings": self.timings}
        return self._constant | {name: fact for name, fact in known.items() if fact is not None}

    def render_text(self, index: int, text: str, make: Callable[[int, str], BaseModel]) -> bytes:
        """What `make` makes of a choice's new text, where nothing but the text changes."""
        key = index, make.__name__
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = TextTemplate(partial(make, index))
        return template.render(text)


class TurnShape(Shape[Turned]):
    """Shape of completions and chats."""

    id_prefix: str
    """Prefix of the answer's id."""

    def __init__(self, service: Service, body: Turned, answer: Answer) -> None:
        super().__init__(service, body, answer)
        self._is_plain = (
            body.num_logprobs is None
            and not body.return_token_ids
            and not body.wants_usage_in_events
        )
        """Whether text events contain only text."""

    @classmethod
    def replay(cls, known: str, body: Turned, headers: dict[str, str]) -> Response:
        """Replay the answer of a committed turn; a stream has its text in one piece."""
        if not body.stream:
            return Response(known, media_type="application/json", headers=headers)
        pieces = [*cls.replay_pieces(known, body), DONE]
        events = b"".join(encode_event(piece) for piece in pieces)
        return Response(events, media_type=EVENT_STREAM, headers=headers | NO_BUFFERING)

    @classmethod
    @abstractmethod
    def replay_pieces(cls, known: str, body: Turned) -> Iterable[EventData]:
        """Events of a stream for a complete answer."""

    @property
    def _usage(self) -> Usage | None:
        """Usage so far, if every event includes it."""
        return self.answer.usage if self.body.wants_usage_in_events else None


def as_json(model: BaseModel | None) -> str | None:
    return None if model is None else dump_json(model).decode()


def usage_fields(body: GenerationRequest, usage: Usage | None) -> dict[str, Usage | None]:
    """The usage field of a text event: null if the usage comes in an event of its own."""
    if body.wants_usage_in_events:
        return {"usage": usage}
    return {"usage": None} if body.wants_usage_event else {}
