"""What crosses the engine's boundary: small immutable messages, in both directions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # what only counts requests needs neither torch nor grammars
    from model.decoding.grammar import Grammar
    from model.decoding.sampling import SamplingParams


@dataclass(frozen=True)
class StoredState:
    """A state to continue from. If the device still has a row with it, the row is continued in
    place; otherwise the bytes are imported."""

    id: str
    """Names this state and no other."""

    data: bytes
    """The bytes of a row."""

    is_initial: bool = False
    """Stands for the state before the first token: beginnings of prompts behind it are shared."""


@dataclass(frozen=True)
class Continuation:
    """What a sequence continues from besides its state. Saved with a session."""

    position: int = 0
    """Tokens of the sequence so far, those pending included."""

    pending: tuple[int, ...] = ()
    """The last of them that are not in the state yet; they are read first. None is where a text
    ended before the token that was sampled last: the state itself tells what can follow."""

    undecoded: bytes = b""
    """Bytes of the generated text that began a character, at most three."""

    recent: bytes = b""
    """`model.decoding.sampling.RecentTokens` as bytes: what the penalties look back on."""


@dataclass(frozen=True)
class ThinkingBudget:
    """After so many tokens without it, the text that closes thoughts is put into the answer."""

    max_tokens: int
    close: bytes
    close_ids: tuple[int, ...]
    """The tokens that are put in, with the text in them."""


@dataclass(frozen=True)
class EngineRequest:
    """One turn: read the prompt's tokens, then generate."""

    request_id: str
    source: StoredState | None
    """None: start from the state before the first token."""

    continuation: Continuation
    token_ids: tuple[int, ...]
    """The prompt. May be empty unless text is to be generated where there are no tokens at all."""

    max_tokens: int
    sampling: "SamplingParams"
    stop: tuple[str, ...] = ()
    """Texts that end the text. The name of a special token stands for the token as well, as if its
    id were among `stop_token_ids`."""

    end_texts: tuple[str, ...] = ()
    """Texts that end the text as well, without being the client's: `stopped_by` does not tell."""

    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text as the model's end tokens do, also with `ignore_eos`."""

    include_stop: bool = False
    """The stop string, or the stop token, is part of the text and of the state. The model's own end
    token is not."""

    min_tokens: int = 0
    """Before so many tokens nothing ends the text. End and stop tokens cannot be sampled; a stop
    string counts if the token that completes it is the last of so many or a later one, wherever the
    string begins, and is ordinary text otherwise."""

    num_logprobs: int | None = None
    """None: tokens come without their probabilities. Else so many of the most probable tokens come
    with each token of the answer. Probabilities are the model's: before penalties, biases,
    temperature, filters and grammar."""

    return_tokens: bool = False
    """Events have the tokens of their text; they also do when probabilities are asked for."""

    score_prompt: bool = False
    """The prompt's tokens come with probabilities, in one `PromptScored`: with as many of the most
    probable tokens as `num_logprobs` says, and none where it says None."""

    grammar: "Grammar | None" = None
    """What the text of this turn has to keep to. It ends where nothing but its end can follow, also
    with `ignore_eos` and before `min_tokens`."""

    thinking_budget: ThinkingBudget | None = None
    """Not with a grammar."""

    owner: str = ""
    """Whose request it is: owners have equal shares of the engine, and what was read of a common
    beginning is for prompts of the same owner only."""

    keeps_answer: bool = False
    """A prompt that goes on behind this one and its answer reads only what is new: the state at the
    end is kept as those of beginnings are, and found by the text. Looks for such a state itself."""

    opening_bytes: int = 0
    """Bytes at the prompt's end that a prompt which goes on from here will not have there, as of
    thoughts that are not shown again: the state before them is kept in place of that at the end."""

    keep_as: str | None = None
    """Return the state at the end, and keep its row on the device under this id while there is
    space. No other state and no request may have the id."""

    deadline: float | None = None
    """When to give up, on the clock of `time.monotonic`, which processes of a machine share."""

    priority: int = 0
    """Of the owner's requests that wait those with smaller numbers are admitted first."""

    is_flexible: bool = False
    """It is admitted when none of the owner's others waits."""

    client_id: str = ""
    """What the client calls its request, of which this may be one choice: for metrics."""

    @property
    def num_to_read(self) -> int:
        """Tokens that the request costs to read: those that wait from before included, but for the
        last one, which any turn leaves behind."""
        return num_to_read(self.token_ids, self.continuation)


def num_to_read(token_ids: tuple[int, ...], start: Continuation) -> int:
    """Tokens to read of a prompt that follows `start`."""
    return len(token_ids) + max(0, len(start.pending) - 1)


@dataclass(frozen=True)
class Submit:
    """A request, and when it was submitted on the clock of `time.monotonic`."""

    request: EngineRequest
    at: float


@dataclass(frozen=True)
class Cancel:
    """Abandon a request in whatever phase it is; unknown and finished ones are ignored."""

    request_id: str


@dataclass(frozen=True)
class Release:
    """Free the row kept under this state id; unknown ids are ignored."""

    state_id: str


@dataclass(frozen=True)
class Forget:
    """Keep nothing of what was read for an owner's earlier prompts."""

    owner: str


@dataclass(frozen=True)
class Stop:
    """End after the present step."""


Message = Submit | Cancel | Release | Forget | Stop
"""What is sent to the engine's thread."""


@dataclass(frozen=True)
class Timings:
    """Seconds from the submission of a request."""

    queue_s: float
    prefill_s: float
    first_token_s: float | None
    total_s: float


class Token(NamedTuple):
    """A token, and what the model thought of it before it came."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None if it was not asked for, or nothing came before
    the token."""

    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with their log-probabilities, the most probable first."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt's tokens with their probabilities; comes before any text."""

    request_id: str
    tokens: tuple[Token, ...]


class TextDelta(NamedTuple):
    """A generated token and the text that is certain to be part of the answer because of it.

    The text may be empty: half a character, or the beginning of a stop string.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...] = ()
    """If asked for: the tokens whose text begins in what is certain now and was not before, half
    characters when the rest of them is. What a stop string cuts away is in no event, nor is the
    token that ends the text unless it is to be included."""

    num_generated: int = 1
    """Tokens sampled, of which the text came to be; more than one where events were put together
    for somebody who reads slowly."""

    parts: "tuple[TextDelta, ...]" = ()
    """The events that were put together, if any were."""


@dataclass(frozen=True)
class Finished:
    """The end of a turn: all text has been delivered, the state is that of what was delivered."""

    request_id: str
    text: str
    """Text held back until now."""

    reason: Literal["stop", "length"]
    num_generated: int
    """Tokens sampled, those cut by a stop string and the end token included."""

    timings: Timings
    tokens: tuple[Token, ...] = ()
    """Tokens held back until now, as in `TextDelta`."""

    stopped_by: str | int | None = None
    """The stop string or stop token that ended the text; None for the model's end token."""

    cached_tokens: int = 0
    """Tokens of the prompt that were not read, since the state after them was known."""

    state: bytes | None = None
    continuation: Continuation | None = None
    kept_as: str | None = None
    """The state id under which the row stays on the device, if it does."""


@dataclass(frozen=True)
class Failed:
    """The turn ended with an error of the server; nothing is kept."""

    request_id: str
    message: str


@dataclass(frozen=True)
class NoProbabilities:
    """The model's output was no numbers: it can make nothing of the state that the turn began with,
    or is damaged itself. Nothing is kept."""

    request_id: str


@dataclass(frozen=True)
class RowDamaged:
    """The turn's state is no longer made of numbers, though it was at its beginning. Nothing is
    kept."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class GrammarFailed:
    """The text cannot go on, though it does not keep to its grammar yet. Nothing is kept."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class DeadlinePassed:
    """The turn did not end before its deadline; nothing is kept."""

    request_id: str


@dataclass(frozen=True)
class RowGivenUp:
    """A row kept under this state id holds that state no longer."""

    state_id: str
    is_evicted: bool
    """It was needed for another sequence, or lost in an error; otherwise it was continued in place
    or released."""


Ending = Finished | Failed | NoProbabilities | RowDamaged | GrammarFailed | DeadlinePassed
"""What a request ends with."""

Event = PromptScored | TextDelta | Ending
"""What happens to a request."""
