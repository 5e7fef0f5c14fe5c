"""Which tokens may come next in one text."""

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from model.decoding.grammar.source import GrammarSpec
from model.decoding.grammar.vocabulary import NO_CONTINUATION, Vocabulary, failure

Mask = NDArray[np.int32]

BURST_S, TOKEN_S = 0.5, 0.003
"""Processor time that a text may take for its grammar: so much at once, and more with each token.
An ordinary one takes 0.00001 to 0.0001 s a token; what takes 30 times as much is there to stop
others, whose tokens wait meanwhile."""

GRAMMAR_S = 2.0
"""Processor time of all texts of a grammar before it is compiled anew: some 100,000 tokens of
ordinary ones."""

TOO_SLOW = "the grammar takes too long to follow"


class Grammar:
    """A compiled source, shared between texts.

    Its texts share what the library has found out about its tokens. That grows, and when it is full
    the texts fail; before, as a rule, `is_spent` says that new texts should have it compiled anew.
    """

    def __init__(self, spec: GrammarSpec, vocabulary: Vocabulary, compiled: LLMatcher) -> None:
        self.spec = spec
        self.vocabulary = vocabulary
        self.is_spent = False
        self._compiled = compiled
        self._left_s = GRAMMAR_S

    def matcher(self) -> "Matcher":
        """For a text that has not begun."""
        return Matcher(self, self._compiled.deep_copy())

    def spend(self, seconds: float) -> None:
        """Count the processor time of a text: what the library finds out grows with it."""
        self._left_s -= seconds
        if self._left_s < 0:
            self.is_spent = True


class Matcher:
    """One text under a grammar: ask which tokens may come next, accept one of them, and so on."""

    def __init__(self, grammar: Grammar, library: LLMatcher) -> None:
        self._grammar = grammar
        self._library = library
        self._left_s = BURST_S
        self._only_end = False
        self.failure: str | None = None
        """Why the text cannot go on, though it is not complete. No token is allowed then."""

    @property
    def may_end(self) -> bool:
        """The text, as it is, keeps to the grammar."""
        return self.failure is None and self._library.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Nothing but the end can follow. Exact after `fill`; may be late after `accept`."""
        return self.may_end and (self._only_end or self._library.is_stopped())

    def new_mask(self) -> Mask:
        """A mask for `fill`, with no bit set."""
        return np.zeros(self._grammar.vocabulary.num_words, np.int32)

    def fill(self, mask: Mask) -> None:
        """Set the bits of the token ids that may come next, clear the others.

        The mask is `[(vocab_sz + 31) // 32]`, the lowest bit first. End tokens are among them
        exactly when the text may end. All bits are clear after a failure. Other threads run
        meanwhile.
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
        """Go on with a token of the mask. False if there is no way on: `failure` says why."""
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
        """See whether the library gave up."""
        why = failure(self._library)
        if why is not None:
            self.failure = why
            if why != NO_CONTINUATION:
                self._grammar.is_spent = True


def fill_masks(matchers: Sequence[Matcher], masks: Mask) -> None:
    """`Matcher.fill` for several texts: masks `[texts, (vocab_sz + 31) // 32]`.

    One after another: a mask takes microseconds, and threads gained nothing on two cores.
    """
    for matcher, mask in zip(matchers, masks, strict=True):
        matcher.fill(mask)
