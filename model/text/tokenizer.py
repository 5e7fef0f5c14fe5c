"""Text to token ids and back, also one token at a time.

A token stands for a sequence of bytes, so that every string has an encoding and decodes to itself.
A character may be spread over several tokens.
"""

import codecs
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress


class TokenizerError(ValueError):
    """The file is not a tokenizer that this program can use."""


class TooManyTokens(ValueError):
    """A text has more tokens than it may have."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the text has {num_tokens} tokens or more")
        self.num_tokens = num_tokens
        """No more than the text has."""


class Tokenizer(ABC):
    """The tokens of a vocabulary and their bytes; kinds of vocabularies find tokens in a text."""

    special_tokens: dict[str, int]
    """By name. They have no text."""

    token_bytes: list[bytes]
    """By token id; nothing for special tokens and ids without a token."""

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id."""
        return len(self.token_bytes)

    @abstractmethod
    def to_json(self) -> str:
        """What `model.text.formats.from_json` makes the same tokenizer of."""

    @abstractmethod
    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. The names of special tokens in it stand for those tokens.

        Raises TooManyTokens where there are more than `max_tokens`, of a text that is far too long
        before it is tokenised.
        """

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which the names of special tokens are text like any other."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""

    @abstractmethod
    def name_of(self, token_id: int) -> str:
        """What the vocabulary calls a token, special ones included; nothing for other ids."""

    def check_length(self, num_characters: int, max_tokens: int) -> None:
        """Raises TooManyTokens for a text that is longer than so many of the longest tokens."""
        if num_characters > max_tokens * self._longest_token:
            raise TooManyTokens(-(-num_characters // self._longest_token))

    def decode(self, token_ids: Iterable[int], *, names: bool = False) -> str:
        """Text of a whole sequence; special tokens have none, or are there by their names."""
        special = {i: name.encode() for name, i in self.special_tokens.items()} if names else {}
        written = bytearray()  # by many parts, since one join of a million would hold the GIL
        for token_id in token_ids:
            written += special.get(token_id) or self.bytes_of(token_id)
        return written.decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for special tokens and ids without a token."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    @functools.cached_property
    def whole_texts(self) -> dict[int, str]:
        """The texts of the tokens that have no half characters."""
        found = {}
        for token_id, added in enumerate(self.token_bytes):
            with suppress(UnicodeDecodeError):
                found[token_id] = added.decode()
        return found

    @functools.cached_property
    def _longest_token(self) -> int:
        """In bytes; a token never stands for more characters."""
        return max(map(len, (*self.token_bytes, *(n.encode() for n in self.special_tokens))))


class Detokenizer:
    """Text of a growing sequence of tokens, never with half a character.

    Bytes that begin a character wait until it is complete; they can be carried over to another
    Detokenizer, so that a text may be continued later.
    """

    def __init__(self, tokenizer: Tokenizer, undecoded: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(undecoded)
        self._waits = bool(self.undecoded)

    def push(self, token_id: int) -> str:
        """The characters that the token completes."""
        if not self._waits and (text := self._whole_texts.get(token_id)) is not None:
            return text
        text = self._decoder.decode(self._tokenizer.bytes_of(token_id))
        self._waits = bool(self.undecoded)
        return text

    @property
    def undecoded(self) -> bytes:
        """The bytes, at most three, that wait for the rest of their character."""
        return self._decoder.getstate()[0]
