"""Treats names of special tokens in user text as plain text.

A template concatenates texts, and a name may form where they join, such as from `<|` and `end|>`.
So complete names are marked in a text, and, at its ends, possible parts of one. Other text stays
unchanged, since templates may inspect it.
"""

import secrets
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from model.text.tokenizer import Tokenizer, TooManyTokens


def random_digits() -> str:
    """Unguessable text that templates leave unchanged when they change case or escape
    characters."""
    return f"{secrets.randbelow(10**24):024}"


class Marks(NamedTuple):
    """Delimiters of marked text, unique to one rendering."""

    begin: str
    end: str


class SpecialNames:
    """Marks names in texts, and encodes rendered text by its marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {name.lower() for name in tokenizer.special_tokens}
        self._longest = max(map(len, self._names), default=0)
        self._beginnings = {name[:end] for name in self._names for end in range(1, len(name))}
        self._ends = {name[start:] for name in self._names for start in range(1, len(name))}

    def mark(self, text: str, marks: Marks) -> str:
        """Put marks around everything that may be part of a name."""
        parts, done = list[str](), 0
        for start, end in _join(sorted(self._spans(text))):
            parts += (text[done:start], marks.begin, text[start:end], marks.end)
            done = end
        return "".join((*parts, text[done:]))

    def encode(self, text: str, marks: Marks, max_tokens: int) -> list[int]:
        """Encode a text; names of special tokens count only outside marks.

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
        """Spans that may be part of a name, even if the template strips the text or changes its
        case."""
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
    """Merge sorted spans that overlap or touch."""
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
    """Position of the mark, or the end of the text."""
    found = text.find(mark, start)
    return len(text) if found < 0 else found


def _lower(text: str) -> str:
    """Lower case without changing positions: some characters have two in lower case."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)
