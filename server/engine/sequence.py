"""One request on its way through the engine: its tokens, its text, and what a session keeps."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.decoding import MOST_ENDS, DecodeInput
from model.sampling import WINDOW, RecentTokens, SampledRow
from model.state import RowState
from model.tokenizer import Detokenizer, Tokenizer
from server.engine.messages import Continuation, EngineRequest, Timings, Token
from server.engine.scoring import PromptScores

NO_TOKENS = frozenset[int]()


@dataclass(frozen=True)
class Anchor:
    """A point before text that is not certain to stay: a stop string may cut it away again."""

    state: RowState
    position: int
    recent: bytes


class TextStep(NamedTuple):
    """What one sampled token did to the text."""

    text: str
    """Text that is certain now."""

    tokens: tuple[Token, ...]
    """The tokens that begin in it, if they are asked for."""

    stop: str | None
    """A stop string is complete: the text ends before it, or with it if it is to be included."""

    cuts_token: bool
    """The text ends before the token's own does: the sequence must be `cut`."""

    wants_anchor: bool
    """The state as it is, without this token, must be given to `set_anchor`."""


class Sequence:
    """Tokens and text of one turn. The state itself is in a row of the pool."""

    def __init__(
        self,
        request: EngineRequest,
        tokenizer: Tokenizer,
        submitted_at: float,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        start = request.continuation
        self.request = request
        ends = () if request.ignore_eos else eos_token_ids
        self.end_token_ids = frozenset((*ends, *request.stop_token_ids))
        """Tokens that end the text."""

        self._ignored_ends = frozenset(eos_token_ids) - self.end_token_ids
        """End tokens that a grammar must not end the text with while more can follow."""

        self.num_read = 0
        """Tokens of the turn in the state, while the prompt is being read."""

        self.cached_tokens = 0
        """Those of them that the sequence did not read itself."""

        self.digests: tuple[bytes, ...] = ()
        """Names of the prompt's beginnings, chunk by chunk, where they may be shared."""

        self.keep_at = set[int]()
        """Numbers of tokens after which reading stops for the state to be kept."""

        self.waits_for: Sequence | None = None
        """The sequence that reads a common beginning; nothing is read here until then."""

        self.waits_until = 0
        """Tokens of that beginning."""

        self.last_planned = 0
        """The scheduler's step in which it read last, or began."""

        self._tokens = [*start.pending, *request.token_ids]
        self.prompt_scores: PromptScores | None = None
        """Takes the logits of the prompt, if they are asked for."""

        if request.score_prompt:
            num_top = request.num_logprobs or 0
            self.prompt_scores = PromptScores(self._tokens, len(start.pending), num_top)
        self.position = start.position + len(request.token_ids)
        """Tokens of the sequence, those unread included."""

        self.recent = RecentTokens.from_bytes(start.recent)
        for token_id in request.token_ids[-WINDOW:]:
            self.recent.append(token_id, generated=False)
        self.num_generated = 0
        self.submitted_at = submitted_at
        self.admitted_at = self.read_at = submitted_at
        self.first_token_at: float | None = None
        self.last_token_at = submitted_at
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, start.undecoded)
        self._held = ""
        """The end of the text that may be the beginning of a stop string."""

        self._length = 0
        """Characters of the text so far."""

        self._gives_tokens = request.return_tokens or request.num_logprobs is not None
        self._held_tokens = list[tuple[int, Token]]()
        """Tokens that are in no event yet, and where in the text each begins: where it begins
        within a character, that is where this one does."""

        self._anchor: Anchor | None = None
        self._since_anchor = ""
        self._mask: NDArray[np.int32] | None = None
        """Token ids that may come next, where a grammar says it."""

        self.matcher = None if request.grammar is None else request.grammar.matcher()
        self.num_in_flight = 0
        """Steps that were launched for it and whose tokens are not known yet."""

        self._input: DecodeInput | None = None
        self._is_plain = (
            self.matcher is None
            and not request.sampling.changes_logits
            and not self._can_rewind
            and len(self.end_token_ids) <= MOST_ENDS
        )
        """Whether the choice of a token depends on no other and nothing has to be undone."""

    @property
    def unread(self) -> list[int]:
        """Tokens that are not in the state yet."""
        return self._tokens[self.num_read :]

    @property
    def num_unread(self) -> int:
        """Tokens for prefill: all but the last, which the decoding step reads."""
        return max(0, len(self._tokens) - self.num_read - 1)

    @property
    def num_to_stop(self) -> int:
        """Tokens for prefill until the state is to be kept, or all."""
        stops = (at - self.num_read for at in self.keep_at if at > self.num_read)
        return min(stops, default=self.num_unread)

    @property
    def is_read(self) -> bool:
        return self.num_unread == 0

    def check_ids(self, vocab_sz: int) -> None:
        """Raises ValueError when a token id is none of the model's: it would fail a whole step.

        Pending and recent tokens come with a session, and that from wherever it was imported.
        """
        biased = [token_id for token_id, _ in self.request.sampling.logit_bias]
        stops = self.request.stop_token_ids
        ids = [*self._tokens, *self.recent.seen().tolist(), *biased, *stops]
        if ids and not 0 <= min(ids) <= max(ids) < vocab_sz:
            raise ValueError(f"token ids must be from 0 to {vocab_sz - 1}")

    @property
    def can_run_ahead(self) -> bool:
        """Whether another step can be launched for it before the token of the last is known."""
        return (
            self._is_plain
            and self.request.min_tokens <= self.num_generated
            and self.num_generated + self.num_in_flight < self.request.max_tokens
        )

    def decode_input(self, row: int) -> DecodeInput:
        """Its part in the next step: it reads its next token, or the one that is under way."""
        if self.num_in_flight:
            if self._input is None:
                raise RuntimeError("no step was launched that chooses what this one reads")
            if self._input.token_id is not None:
                self._input = self._input._replace(token_id=None)
            return self._input
        sampled = SampledRow(
            self.request.sampling, self.position, self.recent, tuple(self._banned), self._mask
        )
        self._input = DecodeInput(
            row, self.take(1)[0], sampled, self.end_token_ids, self.request.num_logprobs
        )
        return self._input

    @property
    def _banned(self) -> frozenset[int]:
        """Tokens that must not come yet, or at all."""
        early = self.num_generated < self.request.min_tokens
        ignored = NO_TOKENS if self.matcher is None else self._ignored_ends
        return ignored | self.end_token_ids if early else ignored

    def find_allowed(self) -> str | None:
        """Find out which tokens may come next. Returns why none may, if so.

        A complete text is not asked what else is forbidden: it ends in any case.
        """
        if self.matcher is None:
            return None
        if self._mask is None:
            self._mask = self.matcher.new_mask()
        self.matcher.fill(self._mask)
        if self.matcher.failure is not None or self.matcher.is_complete:
            return self.matcher.failure
        words = self._mask.view(np.uint32)
        for token_id in self._banned:
            words[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
        return None if words.any() else "the grammar allows only what min_tokens forbids"

    def take(self, count: int) -> list[int]:
        """The next unread tokens, which the caller puts into the state."""
        taken = self._tokens[self.num_read : self.num_read + count]
        self.num_read += count
        return taken

    def skip_to(self, num_tokens: int) -> None:
        """The caller gives the sequence a state after this many tokens of its turn."""
        self.num_read = self.cached_tokens = num_tokens

    def append(self, token_id: int) -> None:
        """A sampled token: part of the sequence, to be read by the next step."""
        self._tokens, self.num_read = [token_id], 0
        self.position += 1
        self.recent.append(token_id, generated=True)

    @property
    def has_only_text(self) -> bool:
        """Whether its events have nothing but text, none of which is ever held back."""
        return not self.request.stop and not self._gives_tokens

    def push_only_text(self, token_id: int) -> str:
        """`push_text`, where `has_only_text`: the text that is certain now."""
        return self._detokenizer.push(token_id)

    def push_text(self, token: Token) -> TextStep:
        """Add the text of a sampled token, which counts as generated; called before `append`.

        Text that may be the beginning of a stop string is held back, unless the string would be
        part of the text. Where such text begins, the state that does not include it yet may have to
        come back: the result asks for an anchor.
        """
        num_held, start = len(self._held), self._length
        whole_before = self._anchor is None or not self._detokenizer.undecoded
        text = self._held + self._detokenizer.push(token.token_id)
        self._length += len(text) - num_held
        stop, cut = self._find_stop(text, num_held)
        told = num_held if self.request.include_stop else 0
        delivered = text[told:cut]
        begins_here = whole_before and cut >= num_held
        if begins_here:
            self._anchor, self._since_anchor = None, text[num_held:cut]
        else:
            self._since_anchor += delivered
        uncertain = cut < len(text) or bool(self._detokenizer.undecoded)
        if self._gives_tokens:
            self._held_tokens.append((start, token))
        return TextStep(
            text=delivered,
            tokens=self._take_tokens(start - num_held + cut, all_of_them=not uncertain),
            stop=stop,
            cuts_token=stop is not None and uncertain,
            wants_anchor=begins_here and uncertain and stop is None and self._can_rewind,
        )

    def _find_stop(self, text: str, num_held: int) -> tuple[str | None, int]:
        """The stop string that ends the text, if any, and up to where the text is certain.

        `text` begins with what was held: a string counts if it ends behind that.
        """
        stops, include = self.request.stop, self.request.include_stop
        if not stops:
            return None, len(text)
        found = []
        if self.num_generated >= self.request.min_tokens:
            for stop in stops:
                at = text.find(stop, max(0, num_held - len(stop) + 1))
                if at >= 0:
                    found.append((at + len(stop), at, stop))
        if found:  # the string that is complete first counts, wherever tokens begin
            self._held = ""
            end, begin, stop = min(found)
            return stop, end if include else begin
        certain = len(text) - max((_overlap(text, stop) for stop in stops), default=0)
        self._held = text[certain:]
        return None, len(text) if include else certain

    def _take_tokens(self, certain: int, *, all_of_them: bool) -> tuple[Token, ...]:
        """The held tokens that begin in so many characters of the text."""
        held = self._held_tokens
        if not held:
            return ()
        count = sum(all_of_them or place < certain for place, _ in held)
        self._held_tokens = held[count:]
        return tuple(token for _, token in held[:count])

    @property
    def _can_rewind(self) -> bool:
        return self.request.keep_state and bool(self.request.stop)

    def set_anchor(self, state: RowState) -> None:
        """Remember the state before the token whose text was just added and which is not in it."""
        self._anchor = Anchor(state, self.position, self.recent.to_bytes())

    def cut(self) -> RowState | None:
        """End the sequence where its delivered text ends; called instead of `append`.

        Returns the state to go back to, None if the present one is right. Delivered text that this
        state does not include is tokenised anew and left unread.
        """
        anchor, self._anchor = self._anchor, None
        if anchor is not None:
            self.position = anchor.position
            self.recent = RecentTokens.from_bytes(anchor.recent)
        self._tokens, self.num_read = self._tokenizer.encode(self._since_anchor), 0
        self.position += len(self._tokens)
        for token_id in self._tokens:
            self.recent.append(token_id, generated=True)
        self._detokenizer = Detokenizer(self._tokenizer)
        self._held_tokens.clear()
        return None if anchor is None else anchor.state

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """The text held back, now that nothing can complete a stop string, and its tokens."""
        text = "" if self.request.include_stop else self._held
        self._held = ""
        return text, self._take_tokens(self._length, all_of_them=True)

    def continuation(self) -> Continuation:
        """What the next turn continues from."""
        return Continuation(
            position=self.position,
            pending=tuple(self.unread),
            undecoded=self._detokenizer.undecoded,
            recent=self.recent.to_bytes(),
        )

    def timings(self) -> Timings:
        """Durations until now."""
        start, first = self.submitted_at, self.first_token_at
        return Timings(
            queue_s=self.admitted_at - start,
            prefill_s=self.read_at - self.admitted_at,
            first_token_s=None if first is None else first - start,
            total_s=time.monotonic() - start,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )
