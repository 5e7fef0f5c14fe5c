"""What becomes of a turn's events: an answer, whole or piece by piece.

Each endpoint renders it in a shape of its own.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from model.tokenizer import Detokenizer, Tokenizer
from server.api.schemas.generation import (
    PromptTokensDetails,
    SamplingRequest,
    Timings,
    Usage,
)
from server.api.service import Service
from server.api.sse import Message
from server.api.templates import TextTemplate
from server.api.turns import ChoiceSpec, Told, Turn
from server.engine.messages import Finished, PromptScored, Token
from server.engine.messages import Timings as EngineTimings


class PlacedTokens:
    """Tokens, and where in a text each of them begins."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0, undecoded: bytes = b"") -> None:
        """`start` characters come before; `undecoded` is half a character that they end with."""
        self.tokens: list[Token] = []
        self.offsets: list[int] = []
        self._place = start
        self._decoder = Detokenizer(tokenizer, undecoded)

    def extend(self, tokens: Sequence[Token]) -> None:
        """Tokens that follow."""
        for token in tokens:
            self.tokens.append(token)
            self.offsets.append(self._place)
            self._place += len(self._decoder.push(token.token_id))


class Choice:
    """What has come so far of one choice."""

    def __init__(
        self, spec: ChoiceSpec, tokenizer: Tokenizer, start: int, undecoded: bytes
    ) -> None:
        """The text begins with `start` characters of the prompt."""
        self.prompt_ids = spec.token_ids
        self.prompt = PlacedTokens(tokenizer)
        """The prompt's tokens, if they are scored."""

        self.generated = PlacedTokens(tokenizer, start, undecoded)
        """Tokens of the text, if they were asked for."""

        self.text: list[str] = []
        self.num_generated = 0
        self.cached_tokens = 0
        """Tokens of the prompt that this choice did not need to read."""

        self.reason: Literal["stop", "length"] | None = None
        self.stopped_by: str | int | None = None
        self.timings: EngineTimings | None = None

    def take(self, event: Told) -> None:
        """The next event."""
        if isinstance(event, PromptScored):
            self.prompt.extend(event.tokens)
            return
        self.text.append(event.text)
        if event.tokens:
            self.generated.extend(event.tokens)
        if isinstance(event, Finished):
            self.reason, self.num_generated = event.reason, event.num_generated
            self.cached_tokens, self.timings = event.cached_tokens, event.timings
            self.stopped_by = event.stopped_by
        else:
            self.num_generated += event.num_generated

    @property
    def ids(self) -> list[int]:
        """Tokens of the text."""
        return [token.token_id for token in self.generated.tokens]

    @property
    def mean_logprob(self) -> float:
        """Per token of the text; of no tokens the smallest that there is."""
        logprobs = [token.logprob or 0.0 for token in self.generated.tokens]
        return sum(logprobs) / len(logprobs) if logprobs else -float("inf")


class Answer(ABC):
    """The choices of one answer. `take` gets each event before it is rendered."""

    def __init__(
        self,
        service: Service,
        body: SamplingRequest,
        turn: Turn,
        specs: Sequence[ChoiceSpec],
        *,
        answer_id: str,
        echoes: Sequence[str] = (),
    ) -> None:
        """`echoes` are texts that the choices begin with."""
        self.id = answer_id
        self.created = int(time.time())
        self.tokenizer = service.checkpoint.tokenizer
        self.session_id = turn.session_id
        self._constant: dict[str, Any] = {
            "id": self.id,
            "created": self.created,
            "model": service.model_name,
            "system_fingerprint": f"fp_{service.checkpoint.fingerprint[:12]}",
        } | ({} if self.session_id is None else {"session_id": self.session_id})
        self._next_turn = None if turn.session_turn is None else turn.session_turn + 1
        self._body = body
        self._resumed_tokens = turn.start.position
        texts = list(echoes) or [""] * len(specs)
        self.choices = [
            Choice(spec, self.tokenizer, len(text), b"" if spec.token_ids else turn.start.undecoded)
            for spec, text in zip(specs, texts, strict=True)
        ]
        self._templates: dict[int, TextTemplate] = {}

    def take(self, index: int, event: Told) -> None:
        """The next event of a choice."""
        self.choices[index].take(event)

    @abstractmethod
    def opening(self) -> Iterator[BaseModel]:
        """Events of a stream before anything has happened."""

    @abstractmethod
    def pieces(self, index: int, event: Told) -> Iterable[Message]:
        """Events of a stream for what happened to a choice."""

    @abstractmethod
    def whole(self) -> BaseModel:
        """The answer when all choices have finished."""

    @abstractmethod
    def closing(self) -> Iterator[BaseModel]:
        """Events of a stream after everything has happened."""

    def _rendered(self, index: int, text: str, make: Callable[[int, str], BaseModel]) -> bytes:
        """What `make` makes of a choice's new text, where nothing but the text changes."""
        template = self._templates.get(index)
        if template is None:
            template = self._templates[index] = TextTemplate(partial(make, index))
        return template.render(text)

    def to_json(self) -> str:
        """`whole`, as text."""
        return self.whole().model_dump_json(exclude_unset=True)

    @property
    def is_finished(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    @property
    def session_turn(self) -> int | None:
        """The session's turn that this is, as soon as it is committed."""
        return self._next_turn if self.is_finished else None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        num_per_prompt = self._body.num_generated_per_prompt
        firsts = self.choices[::num_per_prompt]
        prompt = self._resumed_tokens + sum(len(choice.prompt_ids) for choice in firsts)
        generated = sum(choice.num_generated for choice in self.choices)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=self._resumed_tokens + self._cached_tokens
            ),
        )

    @property
    def timings(self) -> Timings | None:
        """Those of the slowest choice, when all have finished, if they were asked for."""
        known = [choice.timings for choice in self.choices if choice.timings is not None]
        if not self._body.timings or not self.is_finished or not known:
            return None
        firsts = [t.first_token_s for t in known if t.first_token_s is not None]
        return Timings(
            queue_s=max(t.queue_s for t in known),
            prefill_s=max(t.prefill_s for t in known),
            first_token_s=max(firsts, default=None),
            per_token_s=max(filter(None, map(_per_token_s, self.choices)), default=None),
            total_s=max(t.total_s for t in known),
            cached_tokens=self._cached_tokens,
            resumed_tokens=self._resumed_tokens,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What every shape of the answer and each of its events tells."""
        if not self.is_finished:
            return self._constant
        known = {"session_turn": self.session_turn, "timings": self.timings}
        return self._constant | {name: fact for name, fact in known.items() if fact is not None}

    @property
    def _cached_tokens(self) -> int:
        """Of each prompt what none of its choices needed to read."""
        n = self._body.num_generated_per_prompt
        of_prompts = (self.choices[start : start + n] for start in range(0, len(self.choices), n))
        return sum(min(choice.cached_tokens for choice in choices) for choices in of_prompts)


def new_id(prefix: str) -> str:
    """An answer's id, which cannot be guessed."""
    return f"{prefix}-{secrets.token_hex(16)}"


TIMING_HEADERS = {
    "X-Queue-Time": ("queue_s", "until the request had a row of the engine"),
    "X-Prefill-Time": ("prefill_s", "reading the prompt"),
    "X-Time-To-First-Token": ("first_token_s", "to the first token"),
    "X-Time-Per-Token": ("per_token_s", "between two tokens, on average"),
    "X-Total-Time": ("total_s", "to the last token"),
}
"""Which field of `Timings` each tells, and what it means."""

TIMINGS_TOLD: dict[str, Any] = {
    "headers": {
        name: {
            "description": f"With `timings`: seconds {what}.",
            "schema": {"type": "number", "minimum": 0, "examples": [0.0042]},
        }
        for name, (_, what) in TIMING_HEADERS.items()
    }
}
"""`timing_headers`, for the documentation."""


def timing_headers(timings: Timings | None) -> dict[str, str]:
    """The timings as headers, in seconds."""
    if timings is None:
        return {}
    seconds = {name: getattr(timings, field) for name, (field, _) in TIMING_HEADERS.items()}
    return {name: f"{value:.6f}" for name, value in seconds.items() if value is not None}


def _per_token_s(choice: Choice) -> float | None:
    timings = choice.timings
    if timings is None or timings.first_token_s is None or choice.num_generated < 2:
        return None
    return (timings.total_s - timings.first_token_s) / (choice.num_generated - 1)
