"""Prefill: reads prompts into states, each shared prefix once."""

from collections.abc import Sequence as Row

import torch

from model.network import Network
from model.state import RowState, StatePool
from server.engine.prefixes import SharedPrefixes
from server.engine.sequence import Sequence
from server.engine.slots import Slots
from server.engine.text_sequence import TextSequence
from server.metrics import Metrics

LEAST_CHUNK = 64
"""Minimum tokens of a cached prefix: shorter ones are not worth a state."""


class PromptReader:
    """Reads prompts into the rows of their sequences."""

    def __init__(
        self,
        network: Network,
        pool: StatePool,
        slots: Slots,
        prefix_cache_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._network = network
        self._pool = pool
        self._slots = slots
        self._metrics = metrics
        state_bytes = network.state_spec.num_bytes
        chunk = -(-LEAST_CHUNK // network.cut) * network.cut
        self._prefixes = SharedPrefixes[RowState](prefix_cache_bytes, state_bytes, chunk)

    def begin(self, sequence: Sequence) -> None:
        """Start from a cached prefix, or wait for one that is being read.

        The row must hold the empty state, or the state after what the sequence has read.
        """
        state = self._prefixes.begin(sequence)
        if state is not None:
            self._pool.write_row(self._row(sequence), state)

    def read(self, pieces: Row[tuple[TextSequence, int]]) -> None:
        """Read the next `count` tokens of each prompt."""
        longest = max(count for _, count in pieces)
        ids = torch.zeros(len(pieces), longest, dtype=torch.long)
        for i, (sequence, count) in enumerate(pieces):
            ids[i, :count] = torch.tensor(sequence.pop_unread(count))
        rows = [self._row(sequence) for sequence, _ in pieces]
        lengths = [count for _, count in pieces]
        scores = {i: sequence.prompt_scores for i, (sequence, _) in enumerate(pieces)}
        scored = {i: each.add for i, each in scores.items() if each is not None}
        self._network.prefill(ids, lengths, self._pool, rows, scored)
        for sequence, _ in pieces:
            if sequence.num_read in sequence.keep_at:
                self._keep(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence has stopped reading; those that waited for it begin again."""
        for orphan in self._prefixes.leave(sequence):
            self.begin(orphan)

    def count(self, sequence: Sequence) -> None:
        """Count a completed prompt in the metrics."""
        self._metrics.prompt_tokens_total.inc(len(sequence.request.token_ids))
        if sequence.cached_tokens:
            self._metrics.prefix_cache_hits_total.inc()
            self._metrics.prefix_cached_tokens_total.inc(sequence.cached_tokens)

    def forget(self) -> None:
        """Forget all sequences."""
        self._prefixes.forget_readers()

    def forget_kept(self) -> None:
        """Drop the cached states: one of them may be damaged."""
        self._prefixes.forget_kept()
        self._metrics.prefix_cache_bytes.set(0)

    def _keep(self, sequence: Sequence) -> None:
        """Cache the state, and copy it to sequences that wait for it."""
        state = self._pool.read_row(self._row(sequence))
        for follower in self._prefixes.keep(sequence, state):
            self._pool.write_row(self._row(follower), state)
        self._metrics.prefix_cache_bytes.set(self._prefixes.num_bytes)

    def _row(self, sequence: Sequence) -> int:
        return self._slots.row(sequence.request.request_id)
