"""Random texts under grammars."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model.decoding.grammar import (
    Grammar,
    GrammarSpec,
    Matcher,
)
from model.text.tokenizer import Tokenizer

VOCAB_SZ = 4_200
ENDS = (0, 3)
LONG = 150
"""Tokens after which a text that need not end is led to its end."""


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def allowed(matcher: Matcher, vocab_sz: int = VOCAB_SZ) -> list[int]:
    """The token ids of the mask."""
    mask = np.full((vocab_sz + 31) // 32, -1, np.int32)
    matcher.fill(mask)
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


def leading_out(tokens: Tokenizer, ids: Sequence[int], chance: random.Random) -> int:
    """A token that closes something, if there is one."""
    for closing in (b'"', b"}", b"]", b")"):
        found = [i for i in ids if tokens.bytes_of(i).startswith(closing)]
        if found:
            return min(found, key=lambda i: len(tokens.bytes_of(i)))
    return chance.choice(ids)


def write(
    grammar: Grammar,
    tokens: Tokenizer,
    seed: int,
    fits: Callable[[str], bool] | None = None,
) -> str:
    """A random text. Checks the masks on the way; `fits` says whether a text may end."""
    chance, matcher, written = random.Random(seed), grammar.matcher(), b""
    for place in range(20 * LONG):
        ids = allowed(matcher)
        assert ids, matcher.failure
        ends = [i for i in ids if i in ENDS]
        assert ends == (list(ENDS) if matcher.may_end else [])
        assert all(i in ENDS or tokens.bytes_of(i) for i in ids)
        assert matcher.is_complete == (len(ids) == len(ends))
        if fits is not None:
            assert bool(ends) == (is_text(written) and fits(written.decode()))
        long = place > LONG
        if ends and long:
            chosen = ends[0]
        else:
            chosen = leading_out(tokens, ids, chance) if long else chance.choice(ids)
        assert matcher.accept(chosen)
        if chosen in ENDS:
            assert matcher.is_complete
            return written.decode()
        written += tokens.bytes_of(chosen)
    raise AssertionError(f"no end: {written[:500]!r}")


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def accepts(grammar: Grammar, tokens: Tokenizer, text: str) -> bool:
    """The text may be written, byte by byte, and end there."""
    matcher = grammar.matcher()
    return all(
        matcher.accept(tokens.token_bytes.index(bytes([byte]))) for byte in text.encode()
    ) and (matcher.may_end)
