"""Prompts that are being read: each common beginning once."""

from model.network import Network
from model.state import RowState, StatePool
from server.engine.prefixes import SharedPrefixes
from server.engine.sequence import EngineSequence
from server.engine.slots import Slots
from server.metrics import Metrics

SHORTEST_SHARED = 64
"""Tokens of a beginning that is worth a state, or the network's cut if that is more."""


class PrefillRunner:
    """Says where in their prompts sequences begin to read, and keeps states for others."""

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

    def begin(self, sequence: EngineSequence) -> None:
        """Start from a cached prefix, or wait for one that is being read.

        The row must hold the empty state, or the state after what the sequence has read.
        """
        state = self._prefixes.begin(sequence)
        if state is not None:
            self._pool.write_row(self._row(sequence), state)

    def retain(self, sequence: EngineSequence) -> None:
        """A piece was read: if the sequence stopped there for it, keep the state for later prompts,
        and give it to those that wait for it."""
        if sequence.num_read not in sequence.retain_at:
            return
        state = self._pool.read_row(self._row(sequence))
        for follower in self._prefixes.retain(sequence, state):
            self._pool.write_row(self._row(follower), state)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def leave(self, sequence: EngineSequence) -> None:
        """The sequence has stopped reading; those that waited for it begin again."""
        for orphan in self._prefixes.leave(sequence):
            self.begin(orphan)

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
        """Give up the states that were kept for an owner's later prompts."""
        self._prefixes.forget_owner(owner)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def drop_retained(self) -> None:
        """Drop the cached states: one of them may be damaged."""
        self._prefixes.drop_retained()
        self._metrics.prefix_cache_bytes.set(0)

    def _row(self, sequence: EngineSequence) -> int:
        return self._slots.row(sequence.request.request_id)
