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
"""In every so many steps the prompt that has waited longest is read first, however long it is; in
the others the one with the fewest tokens left."""

PIECES_PER_CHUNK = 4
"""A piece of a prompt counts as at least this part of a chunk: where the network is not compiled it
computes whole chunks of attention."""


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that bound the engine's memory and the time of a step."""

    max_running: int
    """Sequences that read or decode at the same time."""

    warm_sessions: int
    """Rows beyond those, where the states of finished turns stay."""

    max_waiting: int
    """Requests that may wait for a row."""

    max_waiting_tokens: int
    """Prompt tokens of the requests that wait."""

    prefill_chunk_tokens: int
    """Prompt tokens that a step reads at most while nothing decodes; a prompt with more is long."""

    prefill_tokens_while_decoding: int
    """Prompt tokens that a step reads at most while sequences decode."""

    prefix_cache_bytes: int
    """Memory for states after beginnings of prompts."""

    @property
    def max_long_prompts(self) -> int:
        """Long prompts that are read at the same time: a row in four is left to the others."""
        return max(1, self.max_running * 3 // 4)


@dataclass(frozen=True)
class Plan(Generic[S]):
    """One step of the engine."""

    prefill: tuple[tuple[S, int], ...]
    """Sequences and how many tokens of them to read."""

    decode: tuple[S, ...]
    """In the order of their rows."""


class Scheduler(Generic[S]):
    """The sequences in the engine, by phase, and the rows that they own."""

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
        """The sequence of a request in any phase."""
        return next((s for s in self.sequences() if s.request.request_id == request_id), None)

    def sequences(self) -> Iterator[S]:
        yield from self.waiting
        yield from self.reading
        yield from self.decoding.values()

    def add(self, sequence: S) -> None:
        """A new sequence waits for a row."""
        self.waiting.append(sequence)
        self._next_deadline = min(self._next_deadline, _deadline(sequence))

    def expired(self, now: float) -> list[S]:
        """Sequences in any phase whose deadline has passed; the caller drops them."""
        if now < self._next_deadline:
            return []
        late = [s for s in self.sequences() if _deadline(s) <= now]
        rest = (_deadline(s) for s in self.sequences() if _deadline(s) > now)
        self._next_deadline = min(rest, default=inf)
        return late

    def admit(self) -> S | None:
        """Let the first waiting sequence that may have a row begin to read.

        First come, first served, but while there are many long prompts another one lets the shorter
        ones pass.
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
        """Read some of the prompts; decode everything that can."""
        return Plan(
            prefill=self._plan_prefill(),
            decode=self.decode_order(),
        )

    def decode_order(self) -> tuple[S, ...]:
        """What decodes, in the order of the rows."""
        return tuple(self.decoding[row] for row in sorted(self.decoding))

    def _plan_prefill(self) -> tuple[tuple[S, int], ...]:
        """Pieces of prompts which padded to the longest of them keep within the budget."""
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
        """The prompts that can be read; a long one for which a short one waits counts as short."""
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
