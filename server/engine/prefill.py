"""Prefill: each shared prefix is read once."""

from model.network import Network
from model.state import RowState, StatePool
from server.engine.prefixes import SharedPrefixes
from server.engine.sequence import EngineSequence
from server.engine.slots import Slots
from server.engine.text_sequence import TextSequence
from server.metrics import Metrics

SHORTEST_SHARED = 64
"""Minimum tokens of a prefix worth a state, or the network's cut if larger."""


class PrefillRunner:
    """Decides where sequences start reading their prompts, and caches states for others."""

    def __init__(
        self,
        network: Network,
        pool: StatePool,
        slots: Slots,
        prefix_cache_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._metrics = metrics
        state_bytes, cut = network.state_spec.num_bytes, network.cut
        shared = -(-SHORTEST_SHARED // cut) * cut
        self._prefixes = SharedPrefixes[RowState](prefix_cache_bytes, state_bytes, shared)

    def begin(self, sequence: TextSequence) -> None:
        """Start after a cached answer or a cached prefix, or wait for a sequence that is reading
        the prefix.

        The row holds the state before the first token.
        """
        caches_answer = sequence.request.caches_answer and self._prefixes.may_cache
        if caches_answer and sequence.request.is_anticipated:
            self._prefixes.anticipate(sequence, sequence.prompt_text)
        if not (caches_answer and self._follow_text(sequence)):
            self._begin(sequence)

    def retain(self, sequence: TextSequence) -> None:
        """After a piece: if the sequence stopped there to cache the state, do so, and hand it to
        the waiting sequences."""
        if sequence.num_read in sequence.retain_at:
            state = self._pool.read_row(self._row(sequence))
            for follower in self._prefixes.retain(sequence, state):
                self._pool.write_row(self._row(follower), state)
        if sequence.cache_text_at and sequence.num_read == sequence.cache_text_at:
            text = sequence.prompt_text
            text = text[: len(text) - sequence.request.opening_bytes]
            state = self._pool.read_row(self._row(sequence))
            self._prefixes.cache_text(sequence.request, text, sequence.before_opening, state)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def cache_answer(self, sequence: TextSequence) -> None:
        """At the end of a turn: cache the state after its answer."""
        if not self._prefixes.may_cache or sequence.cache_text_at or sequence.text.undecoded:
            return
        state = self._pool.read_row(self._row(sequence))
        self._prefixes.cache_text(sequence.request, sequence.whole_text(), sequence.unread, state)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def leave(self, sequence: TextSequence) -> None:
        """The sequence has stopped reading; those waiting for it start again."""
        for orphan in self._prefixes.leave(sequence):
            if isinstance(orphan, TextSequence) and not orphan.waits_until:
                self.begin(orphan)
            else:
                self._begin(orphan)

    def count(self, sequence: EngineSequence) -> None:
        """Count a completed prompt in the metrics."""
        self._metrics.prompt_tokens_total.inc(len(sequence.request.token_ids))
        if sequence.cached_tokens:
            self._metrics.prefix_cache_hits_total.inc()
            self._metrics.prefix_cached_tokens_total.inc(sequence.cached_tokens)

    def forget(self) -> None:
        """Forget all sequences."""
        self._prefixes.forget_readers()

    def forget_owner(self, owner: str) -> None:
        """Drop the cached states of an owner."""
        self._prefixes.forget_owner(owner)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def drop_retained(self) -> None:
        """Drop the cached states: one of them may be damaged."""
        self._prefixes.drop_retained()
        self._metrics.prefix_cache_bytes.set(0)

    def _begin(self, sequence: EngineSequence) -> None:
        state = self._prefixes.begin(sequence)
        if state is not None:
            self._pool.write_row(self._row(sequence), state)

    def _follow_text(self, sequence: TextSequence) -> bool:
        """Continue from the state after the longest known text, or wait for it while it is being
        read, if it is further than others."""
        sequence.find_opening()
        request, text = sequence.request, sequence.prompt_text
        found = self._prefixes.find_text(request, text)
        num_known = len(sequence.text_before(self._prefixes.num_retained(sequence)))
        num_found = max(num_known, 0 if found is None else found[0].num_bytes)
        if not request.is_anticipated and self._prefixes.await_text(sequence, text, num_found):
            return True
        if found is None or num_known == num_found:
            return False
        kept, state = found
        if not sequence.continue_after(kept.num_bytes, kept.pending):
            return False
        self._pool.write_row(self._row(sequence), state)
        return True

    def _row(self, sequence: EngineSequence) -> int:
        return self._slots.row(sequence.request.request_id)
