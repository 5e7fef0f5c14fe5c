"""The text of one sequence: tokens become text, and stop strings end it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.text.tokenizer import Detokenizer, Tokenizer
from server.engine.messages import Token


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
        self._held = ""
        """The end of the text that may be the beginning of a stop string."""

        self._length = 0
        """Characters of the text so far."""

        self._held_tokens = list[tuple[int, Token]]()
        """Tokens that are in no event yet, and where in the text each begins: one that begins
        within a character, where the character does."""

        self.has_anchor = False
        """Whether text that is not certain began at the anchor asked for last."""

        self._since_anchor = ""
        """Emitted text after the anchor."""

        self._tokens_since = list[tuple[int, int | None]]()
        """Tokens after the anchor with the number of characters after it, uncertain ones included,
        with which each ends; None within a character."""

        self._anchor_at = 0
        """Characters before the anchor."""

        self._undecoded_there = undecoded
        """`undecoded` at the anchor."""

    @property
    def is_never_held(self) -> bool:
        """Whether events have nothing but text, none of which is ever held back."""
        return not self._rules.stop and not self._rules.returns_tokens

    @property
    def undecoded(self) -> bytes:
        """Bytes of a character that the text began."""
        return self._detokenizer.undecoded

    def push_plain(self, token_id: int) -> str:
        """`push`, where `is_never_held`: the text that is certain now."""
        return self._detokenizer.push(token_id)

    def push(self, token: Token, *, may_stop: bool) -> TextStep:
        """Add the text of a sampled token; a stop string counts if `may_stop`.

        Where text begins that a stop string may cut away, the state before it may have to come
        back: the step asks for an anchor.
        """
        num_held, start = len(self._held), self._length
        undecoded = self.undecoded
        whole_before = not self.has_anchor or not undecoded
        text = self._held + self._detokenizer.push(token.token_id)
        self._length += len(text) - num_held
        stop, end = self._find_stop(text, num_held, may_stop=may_stop)
        emitted = num_held if self._rules.include_stop else 0
        certain = text[emitted:end]
        begins_here = whole_before and end >= num_held
        if begins_here:
            self.has_anchor, self._since_anchor = False, text[num_held:end]
            self._anchor_at, self._undecoded_there = start, undecoded
            self._tokens_since.clear()
        else:
            self._since_anchor += certain
        ends_at = None if self.undecoded else self._length - self._anchor_at
        self._tokens_since.append((token.token_id, ends_at))
        uncertain = end < len(text) or bool(self.undecoded)
        if self._rules.returns_tokens:
            self._held_tokens.append((start, token))
        wants_anchor = begins_here and uncertain and stop is None and self._rules.can_rewind
        self.has_anchor = self.has_anchor or wants_anchor
        return TextStep(
            text=certain,
            tokens=self._release_tokens(start - num_held + end, all_of_them=not uncertain),
            stop=stop,
            cuts_token=stop is not None and uncertain,
            wants_anchor=wants_anchor,
        )

    def cut(self) -> tuple[list[int], str]:
        """End where the emitted text ends. Returns what of it came after the anchor: the tokens
        that end in it, and its rest, in the middle of the next one."""
        emitted, num_kept, end = self._since_anchor, 0, 0
        for count, (_, ends_at) in enumerate(self._tokens_since, 1):
            if ends_at is not None and ends_at <= len(emitted):
                num_kept, end = count, ends_at
        kept = [token_id for token_id, _ in self._tokens_since[:num_kept]]
        undecoded = b"" if kept or emitted else self._undecoded_there
        self._detokenizer = Detokenizer(self._tokenizer, undecoded)
        self._held_tokens.clear()
        self.has_anchor = False
        return kept, emitted[end:]

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """The text held back, now that nothing can complete a stop string, and its tokens."""
        text = "" if self._rules.include_stop else self._held
        self._held = ""
        return text, self._release_tokens(self._length, all_of_them=True)

    def _find_stop(self, text: str, num_held: int, *, may_stop: bool) -> tuple[str | None, int]:
        """The stop string that ends the text, if any, and up to where the text is certain.

        `text` begins with what was held: a string counts if it ends behind that.
        """
        stops, include = self._rules.stop, self._rules.include_stop
        if not stops:
            return None, len(text)
        found = []
        if may_stop:
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

    def _release_tokens(self, certain: int, *, all_of_them: bool) -> tuple[Token, ...]:
        """The held tokens that begin in so many characters of the text."""
        held: Sequence[tuple[int, Token]] = self._held_tokens
        if not held:
            return ()
        count = sum(all_of_them or place < certain for place, _ in held)
        self._held_tokens = list(held[count:])
        return tuple(token for _, token in held[:count])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )
