"""Text to token ids and back, also incrementally.

A token is a sequence of bytes, so every string can be encoded and decodes to itself. A character
may be spread over several tokens.
"""

import codecs
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress


class TokenizerError(ValueError):
    """The file is not a supported tokenizer."""


class TooManyTokens(ValueError):
    """A text exceeds its token limit."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the text has {num_tokens} tokens or more")
        self.num_tokens = num_tokens
        """Lower bound of the text's token count."""


class Tokenizer(ABC):
    """A vocabulary of byte tokens; subclasses implement the tokenisation."""

    special_tokens: dict[str, int]
    """By name. They have no text."""

    token_bytes: list[bytes]
    """By token id; empty for special tokens and unused ids."""

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id."""
        return len(self.token_bytes)

    @abstractmethod
    def to_json(self) -> str:
        """Serialised form for `model.text.formats.from_json`."""

    @abstractmethod
    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. Names of special tokens in it become those tokens.

        Raises TooManyTokens beyond `max_tokens`; a text that is far too long is not tokenised.
        """

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text; names of special tokens in it are ordinary text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` many texts."""

    @abstractmethod
    def name_of(self, token_id: int) -> str:
        """A token's name in the vocabulary, special tokens included; empty for unused ids."""

    def check_length(self, num_characters: int, max_tokens: int) -> None:
        """Raises TooManyTokens if even the longest tokens could not fit the text into
        `max_tokens`."""
        if num_characters > max_tokens * self._longest_token:
            raise TooManyTokens(-(-num_characters // self._longest_token))

    def decode(self, token_ids: Iterable[int], *, names: bool = False) -> str:
        """Text of a sequence; special tokens are omitted or, with `names`, written by name."""
        special = {i: name.encode() for name, i in self.special_tokens.items()} if names else {}
        written = bytearray()  # appended in parts: one join of a million would hold the GIL
        for token_id in token_ids:
            written += special.get(token_id) or self.bytes_of(token_id)
        return written.decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes; empty for special tokens and unused ids."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    @functools.cached_property
    def whole_texts(self) -> dict[int, str]:
        """Texts of the tokens that are valid UTF-8 on their own."""
        found = {}
        for token_id, added in enumerate(self.token_bytes):
            with suppress(UnicodeDecodeError):
                found[token_id] = added.decode()
        return found

    @functools.cached_property
    def _longest_token(self) -> int:
        """Longest token in bytes, hence an upper bound in characters."""
        return max(map(len, (*self.token_bytes, *(n.encode() for n in self.special_tokens))))


class Detokenizer:
    """Incremental decoder that never emits part of a character.

    Bytes of an incomplete character are held back; they can be passed to another Detokenizer to
    continue the text later.
    """

    def __init__(self, tokenizer: Tokenizer, undecoded: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(undecoded)
        self._waits = bool(self.undecoded)

    def push(self, token_id: int) -> str:
        """The characters completed by the token."""
        if not self._waits and (text := self._whole_texts.get(token_id)) is not None:
            return text
        text = self._decoder.decode(self._tokenizer.bytes_of(token_id))
        self._waits = bool(self.undecoded)
        return text

    @property
    def undecoded(self) -> bytes:
        """At most three bytes of an incomplete character."""
        return self._decoder.getstate()[0]
