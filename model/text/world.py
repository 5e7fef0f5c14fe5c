"""The World vocabulary of RWKV, with greedy longest-match tokenisation.

Published as lines `id token length`, where the token is a Python literal of a string or of bytes,
and the length counts its bytes. Id 0 has no line: it ends a text.
"""

import ast
import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.files import read_file
from model.text.tokenizer import Tokenizer, TokenizerError, TooManyTokens

END = "<|rwkv_tokenizer_end_of_text|>"
"""Name of token 0, for publishers that need one."""

PATTERN = "rwkv_vocab_*.txt"
PACKAGE = "pyrwkv_tokenizer"
LARGEST_ID = 1 << 20
TOKEN = -1
"""Key in a tree node, beside bytes: id of the token that ends there."""


class WorldTokenizer(Tokenizer):
    """Greedy longest match over bytes; every byte is a token."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        """Raises TokenizerError if the tokens are not a vocabulary."""
        if missing := {bytes([byte]) for byte in range(256)} - set(tokens.values()):
            raise TokenizerError(f"there is no token for the byte {min(missing)!r}")
        if 0 in tokens:
            raise TokenizerError("id 0 ends a text and cannot be a token of it")
        self.special_tokens = {END: 0}
        self.token_bytes = [b""] * (1 + max(tokens))
        for token_id, token in tokens.items():
            self.token_bytes[token_id] = token

    @staticmethod
    def is_json(text: str) -> bool:
        """Whether it is the output of `to_json`."""
        return text.startswith('{"world":')

    @staticmethod
    def from_json(text: str) -> "WorldTokenizer":
        """The inverse of `to_json`."""
        tokens = json.loads(text)["world"]
        return WorldTokenizer({int(i): token.encode("latin-1") for i, token in tokens.items()})

    def to_json(self) -> str:
        """Tokens by id, one character per byte."""
        tokens = {i: t.decode("latin-1") for i, t in enumerate(self.token_bytes) if t}
        return json.dumps({"world": tokens}, separators=(",", ":"))

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        if max_tokens is not None:
            self.check_length(len(text), max_tokens)
        ids = list[int]()
        for place, part in enumerate(text.split(END)):
            ids += [0] if place else []
            ids += self._encode(part, None if max_tokens is None else max_tokens - len(ids))
        if max_tokens is not None and len(ids) > max_tokens:
            raise TooManyTokens(len(ids))
        return ids

    def encode_text(self, text: str) -> list[int]:
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def name_of(self, token_id: int) -> str:
        if token_id == 0:
            return END
        token = self.bytes_of(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in token)

    def _encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Walk down the tree as far as the text matches, then back to the last token on the
        path."""
        data, tree, ids = text.encode(), self._tree, list[int]()
        start, size = 0, len(data)
        while start < size:
            token_id, end, place = 0, start, start
            node: dict[int, Any] | None = tree
            while place < size and (node := (node or tree).get(data[place])) is not None:
                place += 1
                if (found := node.get(TOKEN)) is not None:
                    token_id, end = found, place
            ids.append(token_id)
            start = end
            if max_tokens is not None and len(ids) > max_tokens:
                raise TooManyTokens(len(ids))
        return ids

    @functools.cached_property
    def _tree(self) -> dict[int, Any]:
        """Nested dictionaries keyed by byte; `TOKEN` holds the id of the token that ends there."""
        root: dict[int, Any] = {}
        for token_id, token in enumerate(self.token_bytes):
            if token:
                node = root
                for byte in token:
                    node = node.setdefault(byte, {})
                node[TOKEN] = token_id
        return root


def find(folder: Path) -> WorldTokenizer:
    """A `rwkv_vocab_*.txt` in the folder, or the vocabulary of an installed package.

    Raises TokenizerError, and OSError.
    """
    return read(vocabulary_file(folder))


def vocabulary_file(folder: Path) -> Path:
    """The file that `find` reads. Raises TokenizerError if there is none."""
    found = sorted(folder.glob(PATTERN))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise TokenizerError(f"{folder}: has more than one vocabulary: {names}")
    if found:
        return found[0]
    package = importlib.util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or ()) if package else ():
        if found := sorted(Path(place).glob(PATTERN)):
            return found[-1]
    raise TokenizerError(
        f"{folder}: no tokenizer: install latentd[rwkv], or put {PATTERN} next to the weights"
    )


def read(path: Path) -> WorldTokenizer:
    """Read a vocabulary file. Raises TokenizerError naming file and line, or OSError."""
    try:
        return WorldTokenizer(_tokens(read_file(path).decode().split("\n")))
    except (TokenizerError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _tokens(lines: Iterable[str]) -> dict[int, bytes]:
    tokens, known = dict[int, bytes](), set[bytes]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token_id, token = _token(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise TokenizerError(f"line {number}: not `id token length`: {line[:60]!r}") from error
        if token_id in tokens or token in known:
            raise TokenizerError(f"line {number}: duplicate id or token")
        tokens[token_id] = token
        known.add(token)
    return tokens


def _token(line: str) -> tuple[int, bytes]:
    """Parses a line without running code. Raises ValueError and the errors of `literal_eval`."""
    first, _, rest = line.partition(" ")
    literal, _, size = rest.rstrip().rpartition(" ")
    token = ast.literal_eval(literal.strip())
    data = token.encode() if isinstance(token, str) else token
    token_id = int(first)
    if not isinstance(data, bytes) or not data or len(data) != int(size):
        raise ValueError
    if not 0 <= token_id <= LARGEST_ID:
        raise ValueError
    return token_id, data
