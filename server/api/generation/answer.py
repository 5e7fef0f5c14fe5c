"""The generated part of an answer. Shapes render it."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from model.text.chat import ThoughtSplitter
from model.text.tokenizer import Detokenizer, Tokenizer
from server.api.generation.turn import AdmittedTurn, TextEvent
from server.api.schemas.generation import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Timings,
    Usage,
)
from server.engine.messages import (
    EngineRequest,
    EngineTimings,
    Finished,
    PromptScored,
    TextDelta,
    Token,
)

TOKEN_SIZE = 16
"""Cost of rendering a token with log-probabilities, in characters."""


class ChoiceDelta(NamedTuple):
    """What an event adds to a choice."""

    choice: int
    """The choice's index."""

    text: str = ""
    thoughts: str = ""
    """The model's thoughts before the text, in chats."""

    tokens: tuple[Token, ...] = ()
    """Tokens that begin in the text, or the prompt's tokens, if requested."""

    offsets: Sequence[int] = ()
    """Their offsets in the choice's text, in characters."""

    num_thought: int = 0
    """This many of the tokens precede the first text after the thoughts."""

    is_prompt: bool = False
    """Whether it is the prompt with its log-probabilities."""

    reason: Literal["stop", "length"] | None = None
    """Why the choice ended; None while it continues."""

    stopped_by: str | int | None = None
    usage: Usage | None = None
    """Usage so far, if every event includes it."""


class PlacedTokens:
    """Tokens with their offsets in a text."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0, undecoded: bytes = b"") -> None:
        """`start`: characters before the first token. `undecoded`: incomplete character at their
        end."""
        self.tokens: list[Token] = []
        self.offsets: list[int] = []
        self._place = start
        self._decoder = Detokenizer(tokenizer, undecoded)

    def extend(self, tokens: Sequence[Token]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)
            self.offsets.append(self._place)
            self._place += len(self._decoder.push(token.token_id))


class Choice:
    """The received part of one choice."""

    def __init__(
        self,
        request: EngineRequest,
        tokenizer: Tokenizer,
        start: int,
        splitter: ThoughtSplitter | None = None,
    ) -> None:
        """The text begins with `start` characters of the prompt."""
        self._splitter = splitter
        self._end_texts = request.end_texts
        self.prompt_ids = request.token_ids
        self.prompt = PlacedTokens(tokenizer)
        """The prompt's tokens, if scored."""

        self.generated = PlacedTokens(tokenizer, start, request.continuation.undecoded)
        """Tokens of the text, if requested."""

        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.written: list[str] = []
        """What the model wrote, with the marks around thoughts and spaces at the ends."""

        self.num_generated = 0
        self.num_thought = 0
        """Generated tokens before the first text after the thoughts."""

        self.num_thought_reported = 0
        """Entries of `generated` before the first text after the thoughts."""

        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache."""

        self.reason: Literal["stop", "length"] | None = None
        self.stopped_by: str | int | None = None
        self.timings: EngineTimings | None = None

    def push(self, event: TextDelta | Finished) -> tuple[str, str]:
        """The text of an event. Returns what it adds to the thoughts, and to the text; called after
        `add`."""
        self.written.append(event.text)
        if self._splitter is None:
            self.text.append(event.text)
            return "", event.text
        thoughts, text = "", ""
        for part, num_generated, num_reported in self._parts(event):
            new = self._splitter.push(part)
            if isinstance(event, Finished):
                rest = self._splitter.flush()
                new = new[0] + rest[0], new[1] + rest[1]
            thoughts, text = thoughts + new[0], text + new[1]
            if self.is_thought:
                self.num_thought = num_generated if self.thoughts or thoughts else 0
                self.num_thought_reported = num_reported
        if thoughts:
            self.thoughts.append(thoughts)
        self.text.append(text)
        return thoughts, text

    def _parts(self, event: TextDelta | Finished) -> list[tuple[str, int, int]]:
        """The texts merged in an event, each with the number of tokens up to its end: generated
        ones, and entries of `generated`."""
        num_generated, num_reported = self.num_generated, len(self.generated.tokens)
        if isinstance(event, Finished):
            return [(event.text, num_generated, num_reported)]
        parts = list[tuple[str, int, int]]()
        for part in reversed(event.parts or (event,)):
            parts.append((part.text, num_generated, num_reported))
            num_generated -= part.num_generated
            num_reported -= len(part.tokens)
        return parts[::-1]

    @property
    def thinks(self) -> bool:
        """Whether there can be thoughts."""
        return self._splitter is not None

    @property
    def has_answer(self) -> bool:
        """Whether there is any text after the thoughts."""
        return any(self.text)

    @property
    def is_thought(self) -> bool:
        """Whether there are only thoughts so far."""
        splitter = self._splitter
        return splitter is not None and splitter.has_thoughts and not splitter.has_answer

    def add(self, event: TextEvent) -> PlacedTokens:
        """Add the next event, except its text. Returns the tokens it was added to."""
        if isinstance(event, PromptScored):
            self.prompt.extend(event.tokens)
            return self.prompt
        if event.tokens:
            self.generated.extend(event.tokens)
        if isinstance(event, Finished):
            self.reason, self.num_generated = event.reason, event.num_generated
            self.cached_tokens, self.timings = event.cached_tokens, event.timings
            is_own = event.stopped_by in self._end_texts
            self.stopped_by = None if is_own else event.stopped_by
        else:
            self.num_generated += event.num_generated
        return self.generated

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the text's tokens; -inf if there are none."""
        logprobs = [token.logprob or 0.0 for token in self.generated.tokens]
        return sum(logprobs) / len(logprobs) if logprobs else -float("inf")

    @property
    def per_token_s(self) -> float | None:
        """Mean seconds between tokens."""
        timings = self.timings
        if timings is None or timings.first_token_s is None or self.num_generated < 2:
            return None
        return (timings.total_s - timings.first_token_s) / (self.num_generated - 1)


class Answer:
    """The answer of one turn: its choices."""

    def __init__(
        self,
        turn: AdmittedTurn,
        tokenizer: Tokenizer,
        answer_id: str,
        *,
        num_per_prompt: int = 1,
        echoes: bool = False,
        counts_usage: bool = False,
        new_splitter: Callable[[], ThoughtSplitter | None] = lambda: None,
    ) -> None:
        """`echoes`: choices begin with their prompts. `counts_usage`: every delta includes the
        usage."""
        self.id = answer_id
        self.created = int(time.time())
        self.session_id = turn.session_id
        self._session_turn = turn.session_turn
        self._resumed_tokens = turn.start.position
        self._num_per_prompt = num_per_prompt
        self._counts_usage = counts_usage
        decode = tokenizer.decode
        self.echoes = [decode(r.token_ids) if echoes else "" for r in turn.requests]
        """The echoed prompt of each choice."""

        self.choices = [
            Choice(request, tokenizer, len(echo), new_splitter())
            for request, echo in zip(turn.requests, self.echoes, strict=True)
        ]
        self._num_unfinished = len(self.choices)
        firsts = self.choices[::num_per_prompt]
        self._prompt_tokens = turn.start.position + sum(len(each.prompt_ids) for each in firsts)
        self._cached_tokens = 0
        """Tokens of each prompt that none of its choices had to read."""

        self.num_generated = 0

    def add(self, index: int, event: TextEvent) -> ChoiceDelta:
        """Add an event of a choice."""
        choice = self.choices[index]
        before = choice.num_generated
        placed = choice.add(event)
        self.num_generated += choice.num_generated - before
        if isinstance(event, Finished):
            self._num_unfinished -= 1
            self._cached_tokens = self._count_cached()
        offsets = placed.offsets[len(placed.offsets) - len(event.tokens) :] if event.tokens else ()
        if isinstance(event, PromptScored):
            tokens, usage = event.tokens, self._usage_so_far
            return ChoiceDelta(index, tokens=tokens, offsets=offsets, is_prompt=True, usage=usage)
        thoughts, text = choice.push(event)
        num_before = len(choice.generated.tokens) - len(event.tokens)
        usage = self._usage_so_far
        return ChoiceDelta(
            index,
            text,
            thoughts,
            event.tokens,
            offsets,
            num_thought=max(0, choice.num_thought_reported - num_before),
            reason=choice.reason,
            stopped_by=choice.stopped_by,
            usage=usage,
        )

    @property
    def _usage_so_far(self) -> Usage | None:
        """The usage, if every delta includes it."""
        return self.usage if self._counts_usage else None

    @property
    def size(self) -> int:
        """Cost of rendering the whole answer, for `Texts.run`."""
        num_tokens = sum(len(c.generated.tokens) + len(c.prompt.tokens) for c in self.choices)
        return TOKEN_SIZE * num_tokens + sum(len(c.prompt_ids) + len(c.text) for c in self.choices)

    @property
    def is_finished(self) -> bool:
        return not self._num_unfinished

    @property
    def session_turn(self) -> int | None:
        """The number of the session's turn, once complete."""
        return self._session_turn if self.is_finished else None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = self._prompt_tokens
        cached = self._resumed_tokens + self._cached_tokens
        details: dict[str, CompletionTokensDetails] = {}
        if any(choice.thinks for choice in self.choices):
            thought = sum(choice.num_thought for choice in self.choices)
            details = {
                "completion_tokens_details": CompletionTokensDetails(reasoning_tokens=thought)
            }
        return Usage(
            **details,
            prompt_tokens=prompt,
            completion_tokens=self.num_generated,
            total_tokens=prompt + self.num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    @property
    def timings(self) -> Timings | None:
        """Timings of the slowest choice, once all have finished."""
        known = [choice.timings for choice in self.choices if choice.timings is not None]
        if not self.is_finished or not known:
            return None
        firsts = [t.first_token_s for t in known if t.first_token_s is not None]
        per_token = [choice.per_token_s for choice in self.choices]
        return Timings(
            queue_s=max(t.queue_s for t in known),
            prefill_s=max(t.prefill_s for t in known),
            first_token_s=max(firsts, default=None),
            per_token_s=max(filter(None, per_token), default=None),
            total_s=max(t.total_s for t in known),
            cached_tokens=self._cached_tokens,
            resumed_tokens=self._resumed_tokens,
        )

    def _count_cached(self) -> int:
        n = self._num_per_prompt
        of_prompts = (self.choices[start : start + n] for start in range(0, len(self.choices), n))
        return sum(min(choice.cached_tokens for choice in choices) for choices in of_prompts)


def new_id(prefix: str) -> str:
    """A new unguessable answer id."""
    return f"{prefix}-{secrets.token_hex(16)}"
