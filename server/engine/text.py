"""The text of one sequence: detokenisation and stop strings."""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from model.text.tokenizer import Detokenizer, Tokenizer
from server.engine.messages import Token
from server.engine.stops import StopFinder

TOKENS_APART = 256
"""While text is held back, another anchor is requested after this many tokens: tokens after the
anchor that is needed are retained, and may have to be read again."""


class TextStep(NamedTuple):
    """Effect of a sampled token on the text."""

    text: str
    """Text that is now final."""

    tokens: tuple[Token, ...]
    """The tokens that begin in it, if requested."""

    stop: str | None
    """The completed stop string, if any: the text ends before it, or after it if it is included."""

    cuts_token: bool
    """The text ends before the token's text does: the sequence must be cut."""

    wants_anchor: bool
    """The state before this token may be needed again."""


@dataclass(frozen=True)
class TextRules:
    """What ends the text and what is reported of it."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    returns_tokens: bool = False
    can_rewind: bool = False
    """Whether the sequence is cut where the text ends, so that a session can continue from
    there."""


class _Position(NamedTuple):
    """A position in the text between two tokens."""

    length: int
    """Characters before it."""

    num_tokens: int
    """Tokens before it."""

    undecoded: bytes
    """Bytes of an incomplete character there."""


class StreamedText:
    """The text so far.

    Text that may begin a stop string is held back, unless the string would be included.
    """

    def __init__(self, tokenizer: Tokenizer, rules: TextRules, undecoded: bytes) -> None:
        """`undecoded`: incomplete character at the end of earlier text."""
        self._tokenizer = tokenizer
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, undecoded)
        self._finder = StopFinder(rules.stop)
        self._held = ""
        """The end of the text that may begin a stop string."""

        self._length = 0
        """Length of the text so far in characters."""

        self._held_tokens = deque[tuple[int, Token]]()
        """Tokens not yet in an event, and where each begins in the text; one that begins within a
        character, where the character does."""

        self._has_anchor = False
        """Whether there is an anchor at `_start`, followed by text that is not final."""

        self._start = _Position(0, 0, undecoded)
        """Position before the text that may have to be cut."""

        self._later = deque[_Position]()
        """Later positions that may replace it, once all text before them is final."""

        self._num_tokens = 0
        self._tokens = deque[tuple[int, int | None]]()
        """Tokens after the start, and where each ends in the text, held text included; None within
        a character."""

        self._emitted = ""
        """Emitted text after the start."""

    @property
    def is_unbuffered(self) -> bool:
        """Whether events have only text, and none is ever held back."""
        return not self._rules.stop and not self._rules.returns_tokens

    @property
    def is_certain(self) -> bool:
        """Whether no stop string can cut the text so far."""
        return not self._held and not self.undecoded

    @property
    def undecoded(self) -> bytes:
        """Bytes of an incomplete character at the end of the text."""
        return self._detokenizer.undecoded

    @property
    def num_anchors(self) -> int:
        """Number of anchors that may still be needed, the most recent ones."""
        return self._has_anchor + len(self._later) if self._rules.can_rewind else 0

    def push_plain(self, token_id: int) -> str:
        """`push` if `is_unbuffered`: the text that is now final."""
        return self._detokenizer.push(token_id)

    def push(self, token: Token, *, may_stop: bool) -> TextStep:
        """Add the text of a sampled token; a stop string counts if `may_stop`.

        If text begins here that a stop string may cut, the state before it may be needed again: the
        step requests an anchor.
        """
        num_held, start = len(self._held), self._length
        undecoded = self.undecoded
        whole_before = not self._has_anchor or not undecoded
        piece = self._detokenizer.push(token.token_id)
        text = self._held + piece
        self._length += len(piece)
        stop, end = self._find_stop(text, piece, may_stop=may_stop)
        emitted = num_held if self._rules.include_stop else 0
        certain = text[emitted:end]
        uncertain = end < len(text) or bool(self.undecoded)
        begins_here = whole_before and end >= num_held
        wants_anchor = False
        if begins_here:
            self._start = _Position(start, self._num_tokens, undecoded)
            self._emitted = text[num_held:end]
            self._later.clear()
            self._tokens.clear()
            wants_anchor = uncertain and stop is None and self._rules.can_rewind
            self._has_anchor = wants_anchor
        else:
            self._emitted += certain
            last = self._later[-1] if self._later else self._start
            is_far = self._num_tokens - last.num_tokens >= TOKENS_APART
            if is_far and not undecoded and stop is None:
                self._later.append(_Position(start, self._num_tokens, undecoded))
                wants_anchor = self._rules.can_rewind
        self._num_tokens += 1
        self._tokens.append((token.token_id, None if self.undecoded else self._length))
        if stop is None:
            self._move_start(start - num_held + end)
        if self._rules.returns_tokens:
            self._held_tokens.append((start, token))
        return TextStep(
            text=certain,
            tokens=self._release_tokens(start - num_held + end, all_of_them=not uncertain),
            stop=stop,
            cuts_token=stop is not None and uncertain,
            wants_anchor=wants_anchor,
        )

    def cut(self) -> tuple[list[int], str]:
        """End where the emitted text ends. Returns its part after the start: the tokens that end in
        it, and the remaining text in the middle of the next one."""
        emitted, num_retained, end = self._emitted, 0, 0
        for count, (_, ends_at) in enumerate(self._tokens, 1):
            if ends_at is not None and ends_at - self._start.length <= len(emitted):
                num_retained, end = count, ends_at - self._start.length
        kept = [token_id for token_id, _ in islice(self._tokens, num_retained)]
        undecoded = b"" if kept or emitted else self._start.undecoded
        self._detokenizer = Detokenizer(self._tokenizer, undecoded)
        self._held_tokens.clear()
        self._later.clear()
        self._has_anchor = False
        return kept, emitted[end:]

    def _move_start(self, certain: int) -> None:
        """The first `certain` characters are final: positions before them are dropped."""
        while self._later and self._later[0].length <= certain:
            before, self._start = self._start, self._later.popleft()
            self._emitted = self._emitted[self._start.length - before.length :]
            for _ in range(self._start.num_tokens - before.num_tokens):
                self._tokens.popleft()

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """At the end: the text held back, and its tokens."""
        text = "" if self._rules.include_stop else self._held
        self._held = ""
        return text, self._release_tokens(self._length, all_of_them=True)

    def _find_stop(self, text: str, piece: str, *, may_stop: bool) -> tuple[str | None, int]:
        """The stop string that ends the text, if any, and how far the text is final.

        `text` is what was held, followed by the new piece.
        """
        if not self._rules.stop:
            return None, len(text)
        include = self._rules.include_stop
        found = self._finder.push(piece, may_stop=may_stop)
        if found is not None:
            self._held = ""
            end = len(text) - len(piece) + found[0]
            return found[1], end if include else end - len(found[1])
        certain = len(text) - self._finder.num_held
        self._held = text[certain:]
        return None, len(text) if include else certain

    def _release_tokens(self, certain: int, *, all_of_them: bool) -> tuple[Token, ...]:
        """The held tokens that begin in the first `certain` characters."""
        held, released = self._held_tokens, list[Token]()
        while held and (all_of_them or held[0][0] < certain):
            released.append(held.popleft()[1])
        return tuple(released)
