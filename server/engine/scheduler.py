"""What the next engine step works on. Counts tokens and slots; knows no tensors.

    waiting -> reading (prefill, in chunks) -> decoding -> gone

Every step decodes one token of each decoding sequence and reads a bounded number of prompt tokens,
so a long prompt delays the running streams by little. The last prompt token is not read by prefill:
it goes through the decoding step like any later one, since that is what gives logits.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from server.engine.sequence import Sequence
from server.engine.slots import Slots

READ_TOGETHER = 8
"""Prompts that share a prefill."""

INTERLEAVED_SHARE = 8
"""While sequences decode, a step reads this fraction of the prefill budget."""


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that bound the engine's memory and the time of a step."""

    max_running: int
    """Sequences that read or decode at the same time."""

    warm_sessions: int
    """Rows beyond those, where finished turns leave their state."""

    max_waiting: int
    """Requests that may wait for a row."""

    prefill_chunk_tokens: int
    """Prompt tokens that one step reads at most."""


@dataclass(frozen=True)
class Plan:
    """One step of the engine."""

    prefill: tuple[tuple[Sequence, int], ...]
    """Sequences and how many tokens of them to read."""

    decode: tuple[Sequence, ...]
    """In the order of their rows."""


class Scheduler:
    """The sequences in the engine, by phase, and the rows that they own."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.slots = Slots(limits.max_running + limits.warm_sessions)
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []
        self.decoding: dict[int, Sequence] = {}

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.reading or self.decoding)

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request in any phase."""
        return next((s for s in self.sequences() if s.request.request_id == request_id), None)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.waiting
        yield from self.reading
        yield from self.decoding.values()

    def next_to_admit(self) -> Sequence | None:
        """Take the first waiting sequence, if it may run now."""
        running = len(self.reading) + len(self.decoding)
        if self.waiting and running < self._limits.max_running and self.slots.can_acquire():
            return self.waiting.popleft()
        return None

    def plan(self) -> Plan:
        """Divide the prefill budget evenly among the first prompts; decode everything that can."""
        budget = self._limits.prefill_chunk_tokens
        if self.decoding:
            budget = max(1, budget // INTERLEAVED_SHARE)
        prompts = [s for s in self.reading if s.num_unread > 0][:READ_TOGETHER]
        share = max(1, budget // max(1, len(prompts)))
        return Plan(
            prefill=tuple((s, min(share, s.num_unread)) for s in prompts),
            decode=tuple(self.decoding[row] for row in sorted(self.decoding)),
        )
