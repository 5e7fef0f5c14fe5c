"""Byte-level BPE: text to token ids and back, also one token at a time.

A token of a byte-level vocabulary stands for a sequence of bytes, so every string has an encoding
and decodes to itself. A character may be spread over several tokens.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PIECE = 1 << 18
"""Characters of a text that are tokenised together, at least."""

SEARCHED_TOGETHER = 1 << 14
_BETWEEN_WORDS = re.compile("[A-Za-z](?= [A-Za-z])")


class TokenizerError(ValueError):
    """The file is not a tokenizer that this program can use."""


class TooManyTokens(ValueError):
    """A text has more tokens than it may have."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the text has {num_tokens} tokens or more")
        self.num_tokens = num_tokens
        """No more than the text has."""


class Tokenizer:
    """A byte-level tokenizer of the `tokenizers` library, and the bytes of each of its tokens."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Raises TokenizerError when the tokenizer is not byte-level."""
        self._inner = inner
        settings = json.loads(inner.to_str())
        decoder = (settings.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise TokenizerError(f"the tokenizer's decoder must be ByteLevel, not {decoder}")
        self.special_tokens: dict[str, int] = {
            token["content"]: token["id"] for token in settings["added_tokens"] if token["special"]
        }
        # No word of GPT-2's rule goes on behind a space, nor does a special token.
        splitter = settings.get("pre_tokenizer") or {}
        self._ends_words_at_spaces = (
            settings.get("normalizer") is None
            and splitter.get("type") == "ByteLevel"
            and splitter.get("use_regex", True)
            and not splitter["add_prefix_space"]
            and not any(
                token["lstrip"]
                or token["rstrip"]
                or token["single_word"]
                or " " in token["content"]
                for token in settings["added_tokens"]
            )
        )
        added = {token["id"] for token in settings["added_tokens"]}
        byte_of = _byte_of_character()
        self.token_bytes: list[bytes] = [b""] * self.num_tokens
        for token, token_id in inner.get_vocab().items():
            if token_id in added:
                self.token_bytes[token_id] = b"" if token in self.special_tokens else token.encode()
            elif foreign := set(token) - byte_of.keys():
                raise TokenizerError(f"{foreign.pop()!r} in token {token!r} stands for no byte")
            else:
                self.token_bytes[token_id] = bytes(byte_of[character] for character in token)

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """Reads the format of `tokenizer.json`. Raises TokenizerError."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise TokenizerError(f"not a tokenizer: {error}") from error
        return Tokenizer(inner)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._inner.get_vocab().values(), default=-1)

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. The names of special tokens in it stand for those tokens.

        Raises TooManyTokens where there are more than `max_tokens`, of a text that is far too long
        before it is tokenised.
        """
        if max_tokens is not None:
            self.check_length(len(text), max_tokens)
        return self._encode(self._inner, text, max_tokens)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which the names of special tokens are text like any other."""
        return self._encode(self._plain, text)

    def _encode(
        self, inner: tokenizers.Tokenizer, text: str, max_tokens: int | None = None
    ) -> list[int]:
        """Piece by piece, so that a long text neither holds the GIL nor fills the memory."""
        ids: list[int] = []
        for piece in self._pieces(text):
            # `encode` holds the GIL for half a second a megabyte, and takes twice as long.
            [encoding] = inner.encode_batch_fast([piece], add_special_tokens=False)
            if max_tokens is not None and len(ids) + len(encoding) > max_tokens:
                raise TooManyTokens(len(ids) + len(encoding))
            ids += encoding.ids
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts of a text whose tokens together are the text's, where that can be known."""
        start = place = 0
        while self._ends_words_at_spaces and (place := max(place, start + PIECE)) < len(text):
            between = _BETWEEN_WORDS.search(text, place, place + SEARCHED_TOGETHER)
            if between is None:
                place += SEARCHED_TOGETHER - 2  # the end of a word may be where two of them meet
            else:
                yield text[start : between.end()]
                start = between.end()
        yield text[start:]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

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

    @functools.cached_property
    def _longest_token(self) -> int:
        """In bytes; a token never stands for more characters."""
        return max(map(len, (*self.token_bytes, *(n.encode() for n in self.special_tokens))))

    def name_of(self, token_id: int) -> str:
        """What the vocabulary calls a token, special ones included; nothing for other ids."""
        return self._inner.id_to_token(token_id) or ""

    @functools.cached_property
    def whole_texts(self) -> dict[int, str]:
        """The texts of the tokens that have no half characters."""
        found = {}
        for token_id, added in enumerate(self.token_bytes):
            with suppress(UnicodeDecodeError):
                found[token_id] = added.decode()
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for special tokens and ids without a token."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._inner.to_str())
        plain.encode_special_tokens = True
        return plain


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


def train(texts: Iterable[str], num_tokens: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE over the texts; the special tokens get the lowest ids."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def read(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises TokenizerError naming the file, or OSError."""
    try:
        return Tokenizer.from_json(path.read_text("utf-8"))
    except (TokenizerError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 is itself, other bytes are 256, 257 and so on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
