"""The text of one sequence: tokens become text, and stop strings end it."""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from model.text.tokenizer import Detokenizer, Tokenizer
from server.engine.messages import Token
from server.engine.stops import StopFinder

TOKENS_APART = 256
"""While no text is certain, an anchor is asked for again after so many tokens: what comes after the
one that is needed is kept, and may have to be read again."""


class TextStep(NamedTuple):
    """What one sampled token did to the text."""

    text: str
    """Text that is certain now."""

    tokens: tuple[Token, ...]
    """The tokens that begin in it, if they were asked for."""

    stop: str | None
    """A stop string is complete: the text ends before it, or with it if it is to be included."""

    cuts_token: bool
    """The text ends before the token's own does: the sequence must be cut."""

    wants_anchor: bool
    """The state without this token may have to come back."""


@dataclass(frozen=True)
class TextRules:
    """What ends the text and what is reported of it."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    returns_tokens: bool = False
    can_rewind: bool = False
    """Whether the sequence is cut where the text ends, for a session to continue from there."""


class _Place(NamedTuple):
    """A place in the text between two tokens."""

    length: int
    """Characters before it."""

    num_tokens: int
    """Tokens before it."""

    undecoded: bytes
    """Bytes that begin a character there."""


class OutputText:
    """The text so far.

    Text that may be the beginning of a stop string is held back, unless the string would be part of
    the text.
    """

    def __init__(self, tokenizer: Tokenizer, rules: TextRules, undecoded: bytes) -> None:
        """`undecoded`: bytes of a character that earlier text began."""
        self._tokenizer = tokenizer
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, undecoded)
        self._finder = StopFinder(rules.stop)
        self._held = ""
        """The end of the text that may be the beginning of a stop string."""

        self._length = 0
        """Characters of the text so far."""

        self._held_tokens = deque[tuple[int, Token]]()
        """Tokens that are in no event yet, and where in the text each begins: one that begins
        within a character, where the character does."""

        self._has_anchor = False
        """Whether there is an anchor at `_start`: text that is not certain came after it."""

        self._start = _Place(0, 0, undecoded)
        """Before the text that may have to be cut."""

        self._later = deque[_Place]()
        """Places after it that may follow it, once all text before them is certain."""

        self._num_tokens = 0
        self._tokens = deque[tuple[int, int | None]]()
        """Tokens after the start, and where in the text each ends, uncertain text included; None
        within a character."""

        self._emitted = ""
        """Emitted text after the start."""

    @property
    def is_unbuffered(self) -> bool:
        """Whether events have nothing but text, none of which is ever held back."""
        return not self._rules.stop and not self._rules.returns_tokens

    @property
    def is_certain(self) -> bool:
        """Whether no stop string can cut the text so far."""
        return not self._held and not self.undecoded

    @property
    def undecoded(self) -> bytes:
        """Bytes of a character that the text began."""
        return self._detokenizer.undecoded

    @property
    def num_anchors(self) -> int:
        """Those that may still be needed, the last ones that were asked for."""
        return self._has_anchor + len(self._later) if self._rules.can_rewind else 0

    def push_plain(self, token_id: int) -> str:
        """`push`, where `is_unbuffered`: the text that is certain now."""
        return self._detokenizer.push(token_id)

    def push(self, token: Token, *, may_stop: bool) -> TextStep:
        """Add the text of a sampled token; a stop string counts if `may_stop`.

        Where text begins that a stop string may cut away, the state before it may have to come
        back: the step asks for an anchor.
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
            self._start = _Place(start, self._num_tokens, undecoded)
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
                self._later.append(_Place(start, self._num_tokens, undecoded))
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
        """End where the emitted text ends. Returns what of it came after the start: the tokens
        that end in it, and its rest, in the middle of the next one."""
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
        """So many characters of the text are certain: what comes before them need not be kept."""
        while self._later and self._later[0].length <= certain:
            before, self._start = self._start, self._later.popleft()
            self._emitted = self._emitted[self._start.length - before.length :]
            for _ in range(self._start.num_tokens - before.num_tokens):
                self._tokens.popleft()

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """The text held back, now that nothing can complete a stop string, and its tokens."""
        text = "" if self._rules.include_stop else self._held
        self._held = ""
        return text, self._release_tokens(self._length, all_of_them=True)

    def _find_stop(self, text: str, piece: str, *, may_stop: bool) -> tuple[str | None, int]:
        """The stop string that ends the text, if any, and up to where the text is certain.

        `text` is what was held, and the piece that is new.
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
        """The held tokens that begin in so many characters of the text."""
        held, released = self._held_tokens, list[Token]()
        while held and (all_of_them or held[0][0] < certain):
            released.append(held.popleft()[1])
        return tuple(released)
