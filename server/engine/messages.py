"""Immutable messages to and from the engine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # modules that only count requests need neither torch nor grammars
    from model.decoding.grammar import Grammar
    from model.decoding.sampling import SamplingParams


@dataclass(frozen=True)
class StoredState:
    """A state to continue from: in place if the device still has its row, otherwise imported."""

    id: str
    """Unique id of the state."""

    data: bytes
    """The state's bytes."""

    is_initial: bool = False
    """Represents the state before the first token: prompts after it can share prefixes."""


@dataclass(frozen=True)
class Continuation:
    """What a sequence continues from besides its state. Stored with a session."""

    position: int = 0
    """Tokens of the sequence so far, including pending ones."""

    pending: tuple[int, ...] = ()
    """The last tokens, not yet in the state; read first. Empty if the text ended before the last
    sampled token: the state itself determines what can follow."""

    undecoded: bytes = b""
    """Bytes of an incomplete character, at most three."""

    recent: bytes = b""
    """`model.decoding.sampling.RecentTokens` as bytes, for penalties."""


@dataclass(frozen=True)
class ThinkingBudget:
    """After `max_tokens` tokens of thoughts, the closing mark is inserted into the answer."""

    max_tokens: int
    close: bytes
    close_ids: tuple[int, ...]
    """The inserted tokens, including the mark."""


@dataclass(frozen=True)
class EngineRequest:
    """One turn: read the prompt's tokens, then generate."""

    request_id: str
    source: StoredState | None
    """None: start from the empty state."""

    continuation: Continuation
    token_ids: tuple[int, ...]
    """The prompt. May be empty unless text is generated from the empty state."""

    max_tokens: int
    sampling: "SamplingParams"
    stop: tuple[str, ...] = ()
    """Stop strings. The name of a special token also stops at the token, as if its id were in
    `stop_token_ids`."""

    end_texts: tuple[str, ...] = ()
    """Further stop strings, of the template; not reported in `stopped_by`."""

    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, even with `ignore_eos`."""

    include_stop: bool = False
    """Include the stop string or stop token in the text and the state. The model's own end token
    never is."""

    min_tokens: int = 0
    """Number of tokens before which nothing ends the text. End and stop tokens cannot be sampled; a
    stop string counts only if completed by the last of these tokens or later, wherever it begins,
    and is ordinary text otherwise."""

    num_logprobs: int | None = None
    """None: no log-probabilities. Otherwise the number of most probable tokens returned with each
    token. Log-probabilities are the model's: before penalties, biases, temperature, filters and
    grammar."""

    return_tokens: bool = False
    """Events include the tokens of their text; always so with log-probabilities."""

    score_prompt: bool = False
    """Return the prompt's log-probabilities in one `PromptScored`, with `num_logprobs` most
    probable tokens each (none if it is None)."""

    grammar: "Grammar | None" = None
    """Constraint on the text of this turn. The text ends where nothing else is allowed, even with
    `ignore_eos` and before `min_tokens`."""

    thinking_budget: ThinkingBudget | None = None
    """Not combined with a grammar."""

    owner: str = ""
    """Whose request it is: owners have equal shares of the engine, and shared prefixes are per
    owner."""

    caches_answer: bool = False
    """Cache the state at the end by its text, so that a prompt that extends this one and its answer
    reads only what is new. Also look for such a state."""

    opening_bytes: int = 0
    """Bytes at the prompt's end that a prompt extending it will lack, such as an opening mark of
    thoughts: the state before them is cached instead of that at the end."""

    is_anticipated: bool = False
    """Nobody sent it, and nobody waits for it: the beginning of a prompt that is expected, read so
    that its state is there to be found by the text. It ends at once where all rows are in use.
    With `caches_answer`, and without an answer."""

    retain_as: str | None = None
    """Return the final state, and retain its row on the device under this id, capacity permitting.
    The id must be unique."""

    deadline: float | None = None
    """Deadline on the clock of `time.monotonic`, which all processes of a machine share."""

    priority: int = 0
    """Among the owner's waiting requests, smaller numbers are admitted first."""

    is_flexible: bool = False
    """Admitted only if none of the owner's other requests waits."""

    client_id: str = ""
    """The client's request id, shared by the choices of a request; for metrics."""

    @property
    def num_to_read(self) -> int:
        """Tokens that the request must read: pending ones included, except the last, which every
        turn leaves pending."""
        return num_to_read(self.token_ids, self.continuation)


def num_to_read(token_ids: tuple[int, ...], start: Continuation) -> int:
    """Tokens to read for a prompt after `start`."""
    return len(token_ids) + max(0, len(start.pending) - 1)


@dataclass(frozen=True)
class Submit:
    """Submit a request; `at` is on the clock of `time.monotonic`."""

    request: EngineRequest
    at: float


@dataclass(frozen=True)
class Cancel:
    """Cancel a request in any phase; unknown and finished ones are ignored."""

    request_id: str


@dataclass(frozen=True)
class Release:
    """Free the row retained under this state id; unknown ids are ignored."""

    state_id: str


@dataclass(frozen=True)
class Forget:
    """Drop all cached states of an owner's prompts."""

    owner: str


@dataclass(frozen=True)
class Stop:
    """Stop after the current step."""


EngineMessage = Submit | Cancel | Release | Forget | Stop
"""Messages to the engine's thread."""


@dataclass(frozen=True)
class EngineTimings:
    """Timings of a request in seconds; `total_s` and `first_token_s` are from submission."""

    queue_s: float
    prefill_s: float
    first_token_s: float | None
    total_s: float


class Token(NamedTuple):
    """A token with its log-probability."""

    token_id: int
    logprob: float | None = None
    """None if not requested, or if the token has no context."""

    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with their log-probabilities, most probable first."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt's log-probabilities; sent before any text."""

    request_id: str
    tokens: tuple[Token, ...]


class TextDelta(NamedTuple):
    """A generated token and the text that it makes final.

    The text may be empty: an incomplete character, or the beginning of a stop string.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...] = ()
    """If requested: tokens whose text begins in the newly final part. Tokens cut by a stop string
    are in no event, nor is the token that ends the text unless it is to be included."""

    num_generated: int = 1
    """Number of sampled tokens; more than one if events were merged for a slow reader."""

    parts: "tuple[TextDelta, ...]" = ()
    """The events merged into this one, if any."""


@dataclass(frozen=True)
class Finished:
    """The end of a turn: all text was delivered, and the state matches it."""

    request_id: str
    text: str
    """Text held back until now."""

    reason: Literal["stop", "length"]
    num_generated: int
    """Number of sampled tokens, including the end token and those cut by a stop string."""

    timings: EngineTimings
    tokens: tuple[Token, ...] = ()
    """Tokens held back until now, as in `TextDelta`."""

    stopped_by: str | int | None = None
    """The stop string or stop token that ended the text; None for the model's end token."""

    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""

    state: bytes | None = None
    continuation: Continuation | None = None
    retained_as: str | None = None
    """The state id under which the row is retained, if it is."""


@dataclass(frozen=True)
class Failed:
    """The turn failed with a server error and was rolled back."""

    request_id: str
    message: str


@dataclass(frozen=True)
class InvalidLogits:
    """The model's logits were not finite: the initial state is unusable, or the model is damaged.
    The turn was rolled back."""

    request_id: str


@dataclass(frozen=True)
class RowDamaged:
    """The turn's state became non-finite. The turn was rolled back."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class GrammarFailed:
    """The grammar allows no continuation of an incomplete text. The turn was rolled back."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class DeadlinePassed:
    """The turn exceeded its deadline and was rolled back."""

    request_id: str


@dataclass(frozen=True)
class RowReleased:
    """A retained row no longer holds this state."""

    state_id: str
    is_evicted: bool
    """Evicted for another sequence, or lost in an error; otherwise continued in place or
    released."""


Ending = Finished | Failed | InvalidLogits | RowDamaged | GrammarFailed | DeadlinePassed
"""Final events of a request."""

Event = PromptScored | TextDelta | Ending
"""Events of a request."""
