"""A model's tokens in llguidance's tables."""

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from model.decoding.grammar.errors import GrammarError, one_line
from model.text.tokenizer import Tokenizer

LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=100_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""Lower than llguidance's defaults, which let one token take a second, or one grammar hundreds of
MiB; 100,000 lexer states take 45 to 115 MiB. A string with a maxLength of 5,000 needs a quarter of
them. An object may have about 490 optional properties and any number of required ones."""

TRIAL_TOKENS = 16
"""Tokens generated to check that a grammar has a continuation at all."""

NO_CONTINUATION = "the grammar allows no continuation from here"


class _TokenList:
    """The tokenizer interface of llguidance. Special tokens have no bytes in it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], end: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.eos_token_id = end

    def __call__(self, text: str) -> list[int]:
        """The model's tokens for text that the grammar forces."""
        return self._tokenizer.encode_text(text)


class Vocabulary:
    """llguidance's tables for a network of `vocab_sz` tokens; some ids may have no token."""

    def __init__(self, tokenizer: Tokenizer, vocab_sz: int, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_sz = vocab_sz
        self.end_ids = frozenset(end_ids)
        # llguidance requires one: use an id that is never sampled
        ends = list(end_ids) or [vocab_sz]
        size = max(vocab_sz, 1 + max(ends))
        tokens = (tokenizer.token_bytes + [b""] * size)[:size]
        for end in ends:
            tokens[end] = b""
        wrapped = _TokenList(tokenizer, tokens, ends[0])
        self._library = LLTokenizer(wrapped, n_vocab=size, eos_token=ends)  # type: ignore[arg-type]
        self.num_words = (vocab_sz + 31) // 32
        self.text = self._bits(i for i in range(vocab_sz) if tokens[i])
        """Mask of the tokens that have bytes."""

        self.ends = self._bits(self.end_ids)
        """Mask of the end tokens. Tokens in neither mask are never allowed."""

    def begin(self, source: str) -> LLMatcher:
        """A new text under this source, given in llguidance's form. Raises GrammarError."""
        matcher = LLMatcher(self._library, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        if warnings := matcher.get_grammar_warnings():
            raise GrammarError(one_line(warnings[0]))
        self._try(matcher.deep_copy())
        return matcher

    def _bits(self, ids: Iterable[int]) -> NDArray[np.int32]:
        """A mask of these token ids, `[num_words]`, lowest bit first."""
        bits = np.zeros(self.num_words * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _try(self, matcher: LLMatcher) -> None:
        """Generate the first tokens. Raises GrammarError if there is no continuation."""
        for place in range(TRIAL_TOKENS):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if why := failure(matcher):
                if why != NO_CONTINUATION:
                    raise GrammarError(why)
                if place == 0:
                    raise GrammarError("no text satisfies this")
                return  # the text may be complete
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            ids = [int(i) for i in allowed if i not in self.end_ids and i != self.vocab_sz]
            if not ids:
                return
            matcher.consume_token(ids[0])


def failure(matcher: LLMatcher) -> str | None:
    """Why an incomplete text cannot continue, in one line; None if it can."""
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        return NO_CONTINUATION
    if message:
        return one_line(message)
    return NO_CONTINUATION if matcher.is_stopped() and not matcher.is_accepting() else None
