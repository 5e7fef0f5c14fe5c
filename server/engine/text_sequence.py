"""A sequence with its sampling parameters, text and stop conditions."""

import functools
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.decoding.decoder import MAX_END_TOKENS, Piece
from model.decoding.sampling import WINDOW, RecentTokens, SampledRow
from model.state import RowState
from model.text.tokenizer import Tokenizer
from server.engine.messages import Continuation, EngineRequest, EngineTimings, ThinkingBudget, Token
from server.engine.scoring import PromptScores
from server.engine.sequence import EngineSequence
from server.engine.text import StreamedText, TextRules, TextStep

NO_TOKENS = frozenset[int]()

SNAPSHOT_TOKENS, MAX_REPEATED = 16, 64
"""The row of a sequence that runs ahead is copied every this many tokens, so that a stop string can
cut it; it runs at most this far ahead of its copy."""


@dataclass(frozen=True)
class Anchor:
    """A position before text that a stop string may cut."""

    state: RowState | None
    """None: obtained by reading the snapshot's tokens again."""

    position: int
    recent: bytes
    num_since: int
    """Tokens between the snapshot and this position, if there is a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """A state from which later ones can be recomputed: steps that run ahead read tokens before
    their text is final."""

    state: RowState
    token_ids: list[int]
    """The tokens since then."""


@dataclass(frozen=True)
class End:
    """A regular end of a text."""

    reason: Literal["stop", "length"]
    stopped_by: str | int | None = None
    """As in `Finished`."""


class TextSequence(EngineSequence):
    """A sequence that generates text."""

    def __init__(
        self,
        request: EngineRequest,
        tokenizer: Tokenizer,
        submitted_at: float,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__(request, submitted_at)
        self._tokenizer = tokenizer
        ends = () if request.ignore_eos else eos_token_ids
        special = tokenizer.special_tokens
        stops = (*request.stop, *request.end_texts)
        self._named_stops = {special[name]: name for name in stops if name in special}
        """Special tokens have no text: stop strings that name one are matched by id."""

        self.stop_token_ids = frozenset((*request.stop_token_ids, *self._named_stops))
        """Tokens that end the text on the client's request."""

        self.end_token_ids = self.stop_token_ids.union(ends)
        """All tokens that end the text."""

        start = request.continuation
        self.prompt_scores: PromptScores | None = None
        """Collects the prompt's log-probabilities, if requested."""

        if request.score_prompt:
            num_top = request.num_logprobs or 0
            self.prompt_scores = PromptScores(self._tokens, len(start.pending), num_top)
        self.recent = RecentTokens.from_bytes(start.recent)
        for token_id in request.token_ids[-WINDOW:]:
            self.recent.append(token_id, generated=False)
        caches_state = request.retain_as is not None or request.caches_answer
        self._can_rewind = caches_state and bool(stops)
        self._generated = list[int]()
        """Tokens of the answer, if its state is cached by text."""

        self._prompt_position = self.position
        self._num_opening = 0
        """Tokens at the prompt's end that open the answer."""

        rules = TextRules(
            stops,
            request.include_stop,
            request.return_tokens or request.num_logprobs is not None,
            self._can_rewind,
        )
        self.text = StreamedText(tokenizer, rules, start.undecoded)
        self._anchors = deque[Anchor]()
        """The first one is the position to cut back to; a later one replaces it when the text is
        final up to there."""

        self._snapshot: Snapshot | None = None
        self.num_to_repeat = 0
        """Tokens to read again before the turn ends; nothing is sampled after them."""

        self.num_outdated = 0
        """Steps in flight that were launched before the cut."""

        self.end: End | None = None
        """How the turn ends after that."""

        self._budget = request.thinking_budget
        """None also after the thoughts have ended."""

        self._thought_end = b""
        """The last bytes of the thoughts."""

        self._mask: NDArray[np.int32] | None = None
        """Mask of the allowed tokens, from a grammar or the thinking budget."""

        self.matcher = None if request.grammar is None else request.grammar.matcher()
        # A grammar must not end the text with an ignored end token while more can follow.
        ignored = NO_TOKENS if self.matcher is None else frozenset(eos_token_ids)
        self._banned_later = tuple(sorted(ignored - self.end_token_ids))
        self._banned_early = tuple(sorted(ignored | self.end_token_ids))
        self._piece: Piece | None = None
        """Its piece in the last step that sampled a token."""

        self._is_plain = (
            self.matcher is None
            and not request.sampling.changes_logits
            and len(self.end_token_ids) <= MAX_END_TOKENS
        )
        """Whether sampling does not depend on earlier tokens of the sequence."""

    def check_ids(self, vocab_sz: int) -> None:
        """Raises ValueError for token ids outside the vocabulary, which would fail a whole step.

        Pending and recent tokens come from a session, which may have been imported.
        """
        biased = [token_id for token_id, _ in self.request.sampling.logit_bias]
        stops = self.request.stop_token_ids
        ids = [*self._tokens, *self.recent.seen().tolist(), *biased, *stops]
        if ids and not 0 <= min(ids) <= max(ids) < vocab_sz:
            raise ValueError(f"token ids must be from 0 to {vocab_sz - 1}")

    @property
    def can_run_ahead(self) -> bool:
        """Whether another step can be launched before the last token is known."""
        return (
            self._is_plain
            and self._budget is None
            and not self.num_to_repeat
            and self._can_undo
            and not (self._piece is not None and self._piece.resumes)
            and self.request.min_tokens <= self.num_generated
            and self.num_generated + self.num_in_flight < self.request.max_tokens
        )

    @property
    def _can_undo(self) -> bool:
        """Whether a token that a stop string cuts may be read before the cut."""
        if not self._can_rewind:
            return True
        return self._snapshot is not None and len(self._snapshot.token_ids) < MAX_REPEATED

    def next_token(self, row: int) -> Piece:
        """Its piece in the next step: the next token, or the one still being sampled."""
        if not self.num_in_flight:
            self._piece = self._choosing(row, self.pop_unread(1))
        elif self._piece is None:
            raise RuntimeError("no step in flight samples the token to read")
        elif self._piece.token_ids is not None:
            self._piece = self._piece._replace(token_ids=None, following=None)
        return self._piece

    def next_tokens(self, row: int, count: int) -> Piece:
        """The next tokens of its prompt; after the last ones a token is sampled."""
        start = self.num_read
        ids = self.pop_unread(count)
        if self.generates and self.is_read:
            self._piece = piece = self._choosing(row, ids)
        else:
            piece = Piece(row, ids)
        if self.prompt_scores is None:
            return piece
        return piece._replace(following=self.prompt_scores.following(start, start + count))

    def _choosing(self, row: int, token_ids: list[int]) -> Piece:
        """A piece after which a token is sampled."""
        position = self.position - len(self.unread)
        sampled = SampledRow(self.request.sampling, position, self.recent, self._banned, self._mask)
        return Piece(row, token_ids, sampled, self.end_token_ids, self.request.num_logprobs)

    def find_allowed(self) -> str | None:
        """Compute the mask of allowed tokens. Returns the reason if there are none.

        A complete text only has to end; other constraints do not matter.
        """
        if self._budget is not None:
            self._mask = self._closing_mask(self._budget)
        if self.matcher is None:
            return None
        if self._mask is None:
            self._mask = self.matcher.new_mask()
        self.matcher.fill(self._mask)
        if self.matcher.failure is not None or self.matcher.is_complete:
            return self.matcher.failure
        words = self._mask.view(np.uint32)
        if self._banned:
            ids = np.array(self._banned)
            np.bitwise_and.at(words, ids >> 5, ~(np.uint32(1) << (ids & 31).astype(np.uint32)))
        return None if words.any() else "the grammar allows only what min_tokens forbids"

    def append(self, token_id: int, *, is_read: bool = False) -> None:
        """Append a sampled token. The next step reads it, unless a step launched ahead already
        does."""
        self._tokens, self.num_read = [token_id], int(is_read)
        self.position += 1
        self.recent.append(token_id, generated=True)
        if self.request.caches_answer:
            self._generated.append(token_id)
        if self._snapshot is not None:
            self._snapshot.token_ids.append(token_id)
        if self._budget is not None:
            self._follow_thoughts(self._budget, token_id)

    def push_text(self, token: Token) -> TextStep:
        """Add the text of a sampled token, which counts as generated; call before `append`."""
        step = self.text.push(token, may_stop=self.num_generated >= self.request.min_tokens)
        while len(self._anchors) + step.wants_anchor > self.text.num_anchors:
            self._anchors.popleft()
        return step

    def set_anchor(self, state: RowState | None) -> None:
        """Store the state before the token whose text was just added and which is not in it; None
        if the snapshot covers it."""
        since = 0 if self._snapshot is None else len(self._snapshot.token_ids)
        self._anchors.append(Anchor(state, self.position, self.recent.to_bytes(), since))

    @property
    def wants_snapshot(self) -> bool:
        """After `append`: whether to store the row's state, if steps can run ahead of this
        sequence."""
        if not (self._can_rewind and self._is_plain and self.text.is_certain):
            return False
        since = self._snapshot
        return since is None or len(since.token_ids) >= SNAPSHOT_TOKENS

    def set_snapshot(self, state: RowState) -> None:
        """Store the row's state, after the last token if that is read."""
        self._snapshot = Snapshot(state, self.unread)

    def unread_last(self) -> RowState | None:
        """End before the last token, which a step that ran ahead has read; call after `append`.
        Returns the state to restore; None if nothing continues from it."""
        if self._snapshot is None:
            return None
        return self._repeat(self._snapshot, self._snapshot.token_ids[:-1], self._tokens)

    def cut(self) -> RowState | None:
        """End the sequence where its emitted text ends; call instead of `append`.

        Returns the state to restore, None if the current one is right. Emitted tokens that are not
        in that state become pending; emitted text of part of a token is tokenised again.
        """
        anchor = self._anchors[0] if self._anchors else None
        if anchor is not None:
            self.position = anchor.position
            self.recent = RecentTokens.from_bytes(anchor.recent)
        kept, rest = self.text.cut()
        left = [*kept, *self._tokenizer.encode_text(rest)]
        self._tokens, self.num_read = left, 0
        if self.request.caches_answer:
            num_retained = self.position - self._prompt_position
            self._generated = [*self._generated[:num_retained], *left]
        self.position += len(left)
        for token_id in left:
            self.recent.append(token_id, generated=True)
        if anchor is not None and anchor.state is not None:
            return anchor.state
        if self._snapshot is None or (anchor is None and not self.num_in_flight):
            return None
        since = self._snapshot.token_ids
        return self._repeat(
            self._snapshot, since if anchor is None else since[: anchor.num_since], left
        )

    def _repeat(self, snapshot: Snapshot, token_ids: list[int], left: list[int]) -> RowState:
        """Read these tokens again after the snapshot, except those in `left`. Returns the state to
        restore."""
        self._tokens, self.num_read = [*token_ids, *left], 0
        self.num_to_repeat = len(token_ids)
        self.num_outdated = self.num_in_flight if token_ids else 0
        return snapshot.state

    @functools.cached_property
    def prompt_text(self) -> bytes:
        """The prompt's bytes; special tokens are encoded so that no text can imitate them."""
        return self.text_before(len(self.request.token_ids))

    def text_before(self, num_tokens: int) -> bytes:
        """The bytes of the prompt's first tokens."""
        return b"".join(map(self._marked, self.request.token_ids[:num_tokens]))

    def whole_text(self) -> bytes:
        """The bytes of the prompt and the answer so far."""
        return self.prompt_text + b"".join(map(self._marked, self._generated))

    def find_opening(self) -> None:
        """Stop reading before the opening of the answer, if a token boundary is there; one token
        earlier if it is a single token, which would not be a piece of a prompt. Without an answer,
        stop before the last token, which stays unread."""
        left, ids = self.request.opening_bytes, self.request.token_ids
        count = len(ids)
        if self.request.is_anticipated:
            self.cache_text_at = count - 1
            return
        while left > 0 and count > 1:
            count -= 1
            left -= len(self._marked(ids[count]))
        if left == 0 and count < len(ids):
            self._num_opening = len(ids) - count
            self.cache_text_at = min(count, len(ids) - 2)

    @property
    def before_opening(self) -> list[int]:
        """The tokens between the state cached by text and the end of that text."""
        return self._tokens[self.cache_text_at : len(self._tokens) - self._num_opening]

    def continue_after(self, num_bytes: int, pending: tuple[int, ...]) -> bool:
        """Start after `num_bytes` bytes of the prompt, with a state that has not read `pending`.
        False if the rest has no token boundary there."""
        ids, at, count = self.request.token_ids, 0, 0
        while at < num_bytes:
            at += len(self._marked(ids[count]))
            count += 1
        rest = list[int]()
        if at > num_bytes:  # a token straddles the end of the text
            try:
                over = self._tokenizer.bytes_of(ids[count - 1])[num_bytes - at :].decode()
            except UnicodeDecodeError:
                return False
            rest = self._tokenizer.encode_text(over)
        unread = [*pending, *rest, *ids[count:]]
        if self.cache_text_at:
            self.cache_text_at = max(0, self.cache_text_at - len(ids) + len(unread))
        self._tokens, self.num_read = unread, 0
        self.cached_tokens = max(0, len(ids) - len(unread))
        self.digests = ()
        return True

    def _marked(self, token_id: int) -> bytes:
        text = self._tokenizer.bytes_of(token_id)
        return text.replace(b"\xff", b"\xff\xff") if text else b"\xff%d\xff" % token_id

    def end_by(self, token_id: int) -> str | int | None:
        """The client's stop string or token that this token completes; None for the model's own
        end."""
        if token_id in self.request.stop_token_ids:
            return token_id
        return self._named_stops.get(token_id)

    def continuation(self) -> Continuation:
        """What the next turn continues from."""
        return Continuation(
            position=self.position,
            pending=tuple(self.unread),
            undecoded=self.text.undecoded,
            recent=self.recent.to_bytes(),
        )

    def timings(self) -> EngineTimings:
        """Durations so far."""
        start, first = self.submitted_at, self.first_token_at
        return EngineTimings(
            queue_s=self.admitted_at - start,
            prefill_s=self.read_at - self.admitted_at,
            first_token_s=None if first is None else first - start,
            total_s=time.monotonic() - start,
        )

    def _closing_mask(self, budget: ThinkingBudget) -> NDArray[np.int32] | None:
        """Only the next token of the closing mark, if the thoughts are over budget."""
        num_closing = self.num_generated - budget.max_tokens
        if num_closing < 0:
            return None
        token_id = budget.close_ids[num_closing]
        mask = np.zeros(token_id // 32 + 1, np.int32)
        mask.view(np.uint32)[-1] = 1 << (token_id & 31)
        return mask

    def _follow_thoughts(self, budget: ThinkingBudget, token_id: int) -> None:
        """Track whether the thoughts have ended."""
        size = len(budget.close)
        self._thought_end = self._thought_end[1 - size :] + self._tokenizer.bytes_of(token_id)
        is_closed = self.num_generated - budget.max_tokens == len(budget.close_ids)
        if is_closed or budget.close in self._thought_end:
            self._budget = self._mask = None

    @property
    def _banned(self) -> tuple[int, ...]:
        """Tokens that are not allowed yet, or at all; in order. The closing of thoughts is
        exempt."""
        if self._budget is not None and self._mask is not None:
            return ()
        early = self.num_generated < self.request.min_tokens
        return self._banned_early if early else self._banned_later
