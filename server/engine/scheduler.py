"""What the next engine step works on. Counts tokens and slots; knows no tensors.

    waiting -> reading (prefill, in chunks) -> decoding -> gone

Every step decodes one token of each decoding sequence and reads a bounded number of prompt tokens,
so a long prompt delays the running streams by little. The last prompt token is not read by prefill:
it goes through the decoding step like any later one, since that is what gives logits.

Prompts are cut at whole chunks, counted from where the turn began to read: so cut, the network
computes the same bits however many pieces there are.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from server.engine.sequence import Sequence
from server.engine.slots import Slots

TURN_OF_ALL = 4
"""Every this many steps, the longest waiting prompt is read first, however long; otherwise the one
with the fewest tokens left."""

PIECES_PER_CHUNK = 4
"""A piece of a prompt counts as at least this fraction of a chunk: plain torch computes attention
in whole chunks."""


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class EngineLimits:
    """Limits of the engine's memory and step time."""

    max_running: int
    """Maximum sequences in prefill or decoding."""

    warm_sessions: int
    """Additional rows, for states of finished turns."""

    max_waiting: int
    """Maximum requests waiting for a row."""

    max_waiting_tokens: int
    """Maximum prompt tokens of waiting requests."""

    prefill_chunk_tokens: int
    """Maximum prompt tokens per step while nothing decodes; a longer prompt counts as long."""

    prefill_tokens_while_decoding: int
    """Maximum prompt tokens per step while sequences decode."""

    prefix_cache_bytes: int
    """Memory of the prefix cache."""

    @property
    def max_long_prompts(self) -> int:
        """Maximum concurrent long prompts: one row in four is reserved for others."""
        return max(1, self.max_running * 3 // 4)


@dataclass(frozen=True)
class Plan(Generic[S]):
    """One step of the engine."""

    prefill: tuple[tuple[S, int], ...]
    """Sequences and the number of tokens to read of each."""

    decode: tuple[S, ...]
    """In the order of their rows."""


class Scheduler(Generic[S]):
    """The engine's sequences by phase, and their rows."""

    def __init__(self, limits: EngineLimits, chunk: int) -> None:
        self._limits = limits
        self._chunk = chunk
        self._num_plans = 0
        self._next_deadline = inf
        self.slots = Slots(limits.max_running + limits.warm_sessions)
        self.waiting: deque[S] = deque()
        self.reading: list[S] = []
        self.decoding: dict[int, S] = {}

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.reading or self.decoding)

    def find(self, request_id: str) -> S | None:
        """Find a request's sequence in any phase."""
        return next((s for s in self.sequences() if s.request.request_id == request_id), None)

    def sequences(self) -> Iterator[S]:
        yield from self.waiting
        yield from self.reading
        yield from self.decoding.values()

    def add(self, sequence: S) -> None:
        """Add a new waiting sequence."""
        self.waiting.append(sequence)
        self._next_deadline = min(self._next_deadline, _deadline(sequence))

    def expired(self, now: float) -> list[S]:
        """Sequences past their deadline; the caller drops them."""
        if now < self._next_deadline:
            return []
        late = [s for s in self.sequences() if _deadline(s) <= now]
        rest = (_deadline(s) for s in self.sequences() if _deadline(s) > now)
        self._next_deadline = min(rest, default=inf)
        return late

    def admit(self) -> S | None:
        """Admit the first waiting sequence that may have a row.

        First come, first served, but at the limit of long prompts shorter ones may overtake.
        """
        running = len(self.reading) + len(self.decoding)
        if running >= self._limits.max_running or not self.slots.can_acquire():
            return None
        num_long = sum(self._is_long(s) for s in self.reading)
        may_be_long = num_long < self._limits.max_long_prompts
        for place, sequence in enumerate(self.waiting):
            if may_be_long or not self._is_long(sequence):
                del self.waiting[place]
                self.reading.append(sequence)
                sequence.last_planned = self._num_plans
                return sequence
        return None

    def plan(self) -> Plan[S]:
        """Plan a step: read some prompts, decode all decoding sequences."""
        return Plan(
            prefill=self._plan_prefill(),
            decode=self.decode_order(),
        )

    def decode_order(self) -> tuple[S, ...]:
        """Decoding sequences in row order."""
        return tuple(self.decoding[row] for row in sorted(self.decoding))

    def _plan_prefill(self) -> tuple[tuple[S, int], ...]:
        """Pieces of prompts that, padded to the longest, fit the budget."""
        limits = self._limits
        tokens = (
            limits.prefill_tokens_while_decoding if self.decoding else limits.prefill_chunk_tokens
        )
        budget = max(self._chunk, self._whole_chunks(tokens))
        width, pieces = self._chunk // PIECES_PER_CHUNK, list[tuple[S, int]]()
        for sequence in self._by_urgency():
            count = sequence.num_to_stop
            most = budget // (len(pieces) + 1)
            if count > most:
                count = self._whole_chunks(most)
            if count and width <= most:
                width = max(width, count)
                pieces.append((sequence, count))
        if pieces:
            self._num_plans += 1
            for sequence, _ in pieces:
                sequence.last_planned = self._num_plans
        return tuple(pieces)

    def _by_urgency(self) -> list[S]:
        """Prompts ready to be read; a long one that blocks a short one counts as short."""
        left = {id(s): s.num_unread for s in self.reading}
        for sequence in self.reading:
            reader: Sequence = sequence
            while reader.waits_for is not None:
                reader = reader.waits_for
            left[id(reader)] = min(left[id(reader)], sequence.num_unread)
        ready = [s for s in self.reading if s.waits_for is None]
        ready.sort(key=lambda s: left[id(s)])
        if ready and self._num_plans % TURN_OF_ALL == 0:
            longest_waiting = min(ready, key=lambda s: s.last_planned)
            ready.remove(longest_waiting)
            ready.insert(0, longest_waiting)
        return ready

    def _is_long(self, sequence: S) -> bool:
        return sequence.num_unread > self._limits.prefill_chunk_tokens

    def _whole_chunks(self, tokens: int) -> int:
        return tokens // self._chunk * self._chunk


def _deadline(sequence: Sequence) -> float:
    deadline = sequence.request.deadline
    return inf if deadline is None else deadline
