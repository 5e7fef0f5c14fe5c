"""Byte-level BPE, in the file format of the `tokenizers` library."""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.files import read_file
from model.text.tokenizer import Tokenizer, TokenizerError, TooManyTokens

PIECE = 1 << 18
"""Minimum number of characters tokenised at once."""

SEARCH_SPAN = 1 << 14
MAX_TOKENS_PER_CALL = 1 << 22
"""Limit of a vocabulary; ten times the largest known ones."""

_BETWEEN_WORDS = re.compile("[A-Za-z](?= [A-Za-z])")


class ByteLevelTokenizer(Tokenizer):
    """A byte-level tokenizer of the `tokenizers` library, with the bytes of each token."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Raises TokenizerError if the tokenizer is not byte-level."""
        self._inner = inner
        settings = json.loads(inner.to_str())
        decoder = (settings.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise TokenizerError(f"the tokenizer's decoder must be ByteLevel, not {decoder}")
        self.special_tokens = {
            token["content"]: token["id"] for token in settings["added_tokens"] if token["special"]
        }
        # In GPT-2's pre-tokenisation neither words nor special tokens continue after a space.
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
        num_tokens = 1 + max(inner.get_vocab().values(), default=-1)
        if num_tokens > MAX_TOKENS_PER_CALL:
            raise TokenizerError(f"token id {num_tokens - 1} is not below {MAX_TOKENS_PER_CALL}")
        self.token_bytes = [b""] * num_tokens
        for token, token_id in inner.get_vocab().items():
            if token_id in added:
                self.token_bytes[token_id] = b"" if token in self.special_tokens else token.encode()
            elif foreign := set(token) - byte_of.keys():
                raise TokenizerError(
                    f"{foreign.pop()!r} in token {token!r} does not stand for a byte"
                )
            else:
                self.token_bytes[token_id] = bytes(byte_of[character] for character in token)

    @staticmethod
    def from_json(text: str) -> "ByteLevelTokenizer":
        """Parses a `tokenizer.json`. Raises TokenizerError."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for malformed files
            raise TokenizerError(f"not a tokenizer: {error}") from error
        return ByteLevelTokenizer(inner)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        if max_tokens is not None:
            self.check_length(len(text), max_tokens)
        return self._encode(self._inner, text, max_tokens)

    def encode_text(self, text: str) -> list[int]:
        return self._encode(self._plain, text)

    def _encode(
        self, inner: tokenizers.Tokenizer, text: str, max_tokens: int | None = None
    ) -> list[int]:
        """Tokenise piece by piece, so that a long text neither holds the GIL nor fills the
        memory."""
        ids: list[int] = []
        for piece in self._pieces(text):
            # `encode` holds the GIL for half a second per megabyte, and takes twice as long.
            [encoding] = inner.encode_batch_fast([piece], add_special_tokens=False)
            if max_tokens is not None and len(ids) + len(encoding) > max_tokens:
                raise TooManyTokens(len(ids) + len(encoding))
            ids += encoding.ids
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Split a text where the split cannot change its tokens."""
        start = place = 0
        while self._ends_words_at_spaces and (place := max(place, start + PIECE)) < len(text):
            between = _BETWEEN_WORDS.search(text, place, place + SEARCH_SPAN)
            if between is None:
                place += SEARCH_SPAN - 2  # a word boundary may straddle two spans
            else:
                yield text[start : between.end()]
                start = between.end()
        yield text[start:]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` many texts in parallel."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def name_of(self, token_id: int) -> str:
        return self._inner.id_to_token(token_id) or ""

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._inner.to_str())
        plain.encode_special_tokens = True
        return plain


def train(
    texts: Iterable[str], num_tokens: int, special_tokens: Sequence[str]
) -> ByteLevelTokenizer:
    """Train byte-level BPE on the texts; special tokens get the lowest ids."""
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
    return ByteLevelTokenizer(inner)


def read(path: Path) -> ByteLevelTokenizer:
    """Read a `tokenizer.json`. Raises TokenizerError naming the file, or OSError."""
    try:
        return ByteLevelTokenizer.from_json(read_file(path).decode())
    except (TokenizerError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 is itself, other bytes are 256, 257 and so on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
