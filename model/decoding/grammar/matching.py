"""Token masks of one text."""

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from model.decoding.grammar.source import GrammarSpec
from model.decoding.grammar.vocabulary import NO_CONTINUATION, Vocabulary, failure

Mask = NDArray[np.int32]

BURST_S, TOKEN_S = 0.5, 0.003
"""Processor time a text may spend on its grammar: a fixed amount plus some per token. Ordinary
texts use 0.00001 to 0.0001 s per token; one that uses 30 times as much delays everyone's tokens."""

GRAMMAR_S = 2.0
"""Processor time of all texts of a grammar before it is recompiled: about 100,000 ordinary
tokens."""

TOO_SLOW = "matching the grammar takes too long"


class Grammar:
    """A compiled source, shared between texts.

    Its texts share llguidance's lexer cache. The cache grows, and texts fail when it is full;
    `is_spent` usually becomes true before that, and new texts should then have the source
    recompiled.
    """

    def __init__(self, spec: GrammarSpec, vocabulary: Vocabulary, compiled: LLMatcher) -> None:
        self.spec = spec
        self.vocabulary = vocabulary
        self.is_spent = False
        self._compiled = compiled
        self._left_s = GRAMMAR_S

    def matcher(self) -> "Matcher":
        """A matcher for a new text."""
        return Matcher(self, self._compiled.deep_copy())

    def spend(self, seconds: float) -> None:
        """Add to the processor time of all texts; the lexer cache grows with it."""
        self._left_s -= seconds
        if self._left_s < 0:
            self.is_spent = True


class Matcher:
    """One text under a grammar: alternate `fill` and `accept`."""

    def __init__(self, grammar: Grammar, library: LLMatcher) -> None:
        self._grammar = grammar
        self._library = library
        self._left_s = BURST_S
        self._only_end = False
        self.failure: str | None = None
        """Why the incomplete text cannot continue, if so; no token is allowed then."""

    @property
    def may_end(self) -> bool:
        """Whether the text so far is valid."""
        return self.failure is None and self._library.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether only the end can follow. Exact after `fill`; may be late after `accept`."""
        return self.may_end and (self._only_end or self._library.is_stopped())

    def new_mask(self) -> Mask:
        """A mask for `fill`, all zeros."""
        return np.zeros(self._grammar.vocabulary.num_words, np.int32)

    def fill(self, mask: Mask) -> None:
        """Set the bits of the allowed token ids and clear the others.

        The mask is `[(vocab_sz + 31) // 32]`, lowest bit first. End tokens are allowed exactly when
        the text may end. After a failure all bits are clear. Releases the GIL.
        """
        vocabulary = self._grammar.vocabulary
        mask[:] = 0
        if self.failure is not None:
            return
        begin = time.thread_time()
        found = np.frombuffer(self._library.compute_bitmask(), np.int32)[: vocabulary.num_words]
        self._spend(begin)
        self._check()
        if self.failure is None:
            self._only_end = not (found & vocabulary.text).any()
            if self._only_end and not self._library.is_accepting():
                self.failure = NO_CONTINUATION
            else:
                np.bitwise_and(found, vocabulary.text | vocabulary.ends, out=mask)

    def accept(self, token_id: int) -> bool:
        """Append a token of the mask. False if no continuation is left: `failure` holds the
        reason."""
        if self.failure is not None:
            return False
        begin = time.thread_time()
        self._library.consume_token(token_id)
        self._left_s = min(self._left_s + TOKEN_S, BURST_S)
        self._spend(begin)
        self._check()
        return self.failure is None

    def _spend(self, begin: float) -> None:
        spent = time.thread_time() - begin
        self._grammar.spend(spent)
        self._left_s -= spent
        if self._left_s < 0:
            self.failure = TOO_SLOW

    def _check(self) -> None:
        """Record a failure of the library."""
        why = failure(self._library)
        if why is not None:
            self.failure = why
            if why != NO_CONTINUATION:
                self._grammar.is_spent = True


def fill_masks(matchers: Sequence[Matcher], masks: Mask) -> None:
    """`Matcher.fill` for several texts: masks `[texts, (vocab_sz + 31) // 32]`.

    Sequential: a mask takes microseconds, and threads gained nothing on two cores.
    """
    for matcher, mask in zip(matchers, masks, strict=True):
        matcher.fill(mask)
