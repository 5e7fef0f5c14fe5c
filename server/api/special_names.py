"""Names of special tokens in what users write: there they are text like any other.

A template puts texts together, and where they meet a name may come to be that is in none of them,
as of `<|` and `end|>`. So whole names are marked in a text, and at its ends what may be part of
one. Other text stays as it is: templates may look into it.
"""

import secrets
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from model.text.tokenizer import Tokenizer, TooManyTokens


def random_digits() -> str:
    """Text that nobody can guess, and that templates leave as it is when they change case or
    escape characters."""
    return f"{secrets.randbelow(10**24):024}"


class Marks(NamedTuple):
    """What stands around marked text, in one rendering of a template."""

    begin: str
    end: str


class SpecialNames:
    """Marks names in texts, and finds the marks in what a template makes of these."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {name.lower() for name in tokenizer.special_tokens}
        self._longest = max(map(len, self._names), default=0)
        self._beginnings = {name[:end] for name in self._names for end in range(1, len(name))}
        self._ends = {name[start:] for name in self._names for start in range(1, len(name))}

    def mark(self, text: str, marks: Marks) -> str:
        """The text, with marks around what may be of a name."""
        parts, done = list[str](), 0
        for start, end in _join(sorted(self._spans(text))):
            parts += (text[done:start], marks.begin, text[start:end], marks.end)
            done = end
        return "".join((*parts, text[done:]))

    def encode(self, text: str, marks: Marks, max_tokens: int) -> list[int]:
        """Tokens of a text in which names stand for special tokens, but not where it is marked.

        Raises TooManyTokens.
        """
        ids, at = list[int](), 0
        while at < len(text):
            start = _find(text, marks.begin, at)
            ids += self._tokenizer.encode(text[at:start].replace(marks.end, ""))
            end = _find(text, marks.end, start)
            ids += self._tokenizer.encode_text(text[start:end].replace(marks.begin, ""))
            at = end + len(marks.end)
            if len(ids) > max_tokens:
                raise TooManyTokens(len(ids))
        return ids

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where something of a name is; the template may strip the text, and change its case."""
        lowered = _lower(text)
        for name in self._names:
            at = lowered.find(name)
            while at >= 0:
                yield at, at + len(name)
                at = lowered.find(name, at + 1)
        core = lowered.strip()
        at = lowered.find(core)
        for start, end in {(0, len(lowered)), (at, at + len(core))}:
            for count in range(1, min(self._longest, end - start + 1)):
                if lowered[start : start + count] in self._ends:
                    yield start, start + count
                if lowered[end - count : end] in self._beginnings:
                    yield end - count, end
            if 0 < end - start < self._longest:
                whole = lowered[start:end]
                if any(whole in name for name in self._names):
                    yield start, end


def _join(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted spans, those that overlap or touch as one."""
    first, last = 0, 0
    for start, end in spans:
        if start > last:
            if last:
                yield first, last
            first = start
        last = max(last, end)
    if last:
        yield first, last


def _find(text: str, mark: str, start: int) -> int:
    """Where the mark is; the end of the text if it is nowhere."""
    found = text.find(mark, start)
    return len(text) if found < 0 else found


def _lower(text: str) -> str:
    """In lower case, each character in its place: of some, the lower case is two."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)
