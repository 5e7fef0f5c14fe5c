"""Decides what the next engine step computes. Counts tokens and slots; knows no tensors.

waiting -> prefill, in pieces -> decoding -> gone

A step has a budget of tokens: one per decoding sequence, the rest for pieces of prompts. While
streams run, `Pace` limits the prompt tokens to keep the inter-token latency, so a long prompt
delays them only a little. The first token after a prompt is sampled in the step that reads its end.

Owners (API keys) have equal shares. The owner with the fewest running sequences is admitted first;
if no row is free, the newest sequence of the owner with the most is paused: it keeps its row, and
resumes with the same bits when its owner is next. With more owners than running sequences, the
owner with the fewest computed tokens is next; prompts are read in the same order. An owner that is
alone gets everything.

Prompts are split at multiples of the network's cut, counted from where the turn started to read, so
that the bits do not depend on the number of pieces.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from model.shares import has_space
from server.engine.pace import Pace
from server.engine.sequence import EngineSequence
from server.engine.slots import Slots
from server.engine.waiting import WaitingQueue

FAIRNESS_INTERVAL = 4
"""Every this many steps the longest waiting prompt is read first, whatever its length; otherwise
the one with the fewest tokens left."""

EFFICIENT_TOKENS = 128
"""Minimum prompt tokens of a step without decoding, however long it takes: more would hardly be
faster on a CPU, and delay new requests."""

ALIKE = 2
"""Without decoding, prompts at most this many times as long as the first are read together: their
answers start together, and share each read of the weights."""


QUANTUM = 64
"""Tokens by which an owner must be ahead of another to lose its only running sequence to it."""

S = TypeVar("S", bound=EngineSequence)


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
    """Maximum prompt tokens per step; a prompt with more is long."""

    inter_token_latency_s: float
    """Target duration of a step while sequences decode."""

    prefix_cache_bytes: int
    """Memory of the prefix cache."""

    max_waiting_bytes: int | None = None
    """Size limit of the states of waiting requests; None: no limit."""

    @property
    def max_long_prompts(self) -> int:
        """Maximum concurrent long prompts: one row in four is reserved for others."""
        return max(1, self.max_running * 3 // 4)

    @property
    def num_rows(self) -> int:
        """Rows of the pool."""
        return self.max_running + self.warm_sessions

    @property
    def reserved_rows(self) -> int:
        """Rows reserved for owners that have none; paused sequences of others do not get them."""
        return min(self.warm_sessions, max(1, self.max_running // 4))


@dataclass(frozen=True)
class Plan(Generic[S]):
    """One step of the engine."""

    decode: tuple[S, ...]
    """In the order of their rows."""

    read: tuple[tuple[S, int], ...]
    """Prompts and how many tokens of them to read."""


class Scheduler(Generic[S]):
    """The engine's sequences by phase, and their rows."""

    def __init__(self, limits: EngineLimits, cut: int, max_logits: int) -> None:
        """`max_logits`: maximum rows of logits per step for scored prompts; at least one cut."""
        self._limits = limits
        self._cut = cut
        self._max_logits = max(cut, max_logits)
        self.pace = Pace(limits.inter_token_latency_s)
        self._num_plans = 0
        self._next_deadline = inf
        self.slots = Slots(limits.num_rows)
        self.waiting = WaitingQueue[S]()
        self.prefilling: list[S] = []
        self.decoding: dict[int, S] = {}
        self._served = Counter[str]()
        """Tokens computed for each owner; a returning owner starts with the fewest of the current
        ones."""

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.decoding)

    @property
    def has_seat(self) -> bool:
        """Whether one more may run, after all those that wait."""
        num_held = len(self.waiting) + len(self.prefilling) + len(self.decoding)
        return num_held < self._limits.max_running

    def find(self, request_id: str) -> S | None:
        """Find a request's sequence in any phase."""
        return next((s for s in self.sequences() if s.request.request_id == request_id), None)

    def sequences(self) -> Iterator[S]:
        yield from self.waiting
        yield from self.prefilling
        yield from self.decoding.values()

    def add(self, sequence: S) -> None:
        """A new sequence waits for a row."""
        owner = sequence.request.owner
        if not self.waiting.of(owner):
            self._enter(owner)
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
        """Let sequences run as far as the limits allow. Returns the next one that needs a row; call
        until it returns None.

        Within an owner the order is that of `WaitingQueue`, except that at the limit of long
        prompts shorter ones overtake the others.
        """
        held = [*self.prefilling, *self.decoding.values()]
        running = [s for s in held if not s.is_paused]
        if len(held) == len(running) and not self.waiting:
            return None
        seats = Counter(s.request.owner for s in running)
        while True:
            sequence = self._next(held, seats)
            if sequence is None:
                return None
            owner = sequence.request.owner
            if len(running) >= self._limits.max_running:
                paused = self._to_pause(owner, running, seats)
                if paused is None:
                    return None
                paused.is_paused = True
                running.remove(paused)
                seats[paused.request.owner] -= 1
            if sequence in self.waiting:
                self.waiting.remove(sequence)
                self.prefilling.append(sequence)
                sequence.last_planned = self._num_plans
                return sequence
            sequence.is_paused = False
            running.append(sequence)
            seats[owner] += 1

    def _enter(self, owner: str) -> None:
        """Add a returning owner to those that share the engine."""
        served = {s.request.owner: self._served[s.request.owner] for s in self.sequences()}
        if owner not in served:
            served[owner] = max(self._served[owner], min(served.values(), default=0))
            self._served = Counter(served)

    def _next(self, held: list[S], seats: Counter[str]) -> S | None:
        """The next sequence to run, if one may: of the owner with the fewest running."""
        paused: dict[str, S] = {}
        for sequence in sorted((s for s in held if s.is_paused), key=lambda s: s.admitted_at):
            paused.setdefault(sequence.request.owner, sequence)
        owners = {*paused, *self.waiting.owners}
        rows = Counter(s.request.owner for s in held)
        long = Counter(s.request.owner for s in self.prefilling if self._is_long(s))
        for owner in sorted(owners, key=lambda each: (seats[each], self._served[each])):
            if owner in paused:
                return paused[owner]
            num_free = self.slots.num_rows - self.slots.num_active
            if num_free <= (self._limits.reserved_rows if rows[owner] else 0):
                continue
            num_owners = len(rows.keys() | owners)
            most = self._limits.max_long_prompts
            may_be_long = has_space(long[owner], long.total(), 1, most, num_owners)
            for sequence in self.waiting.of(owner):
                if may_be_long or not self._is_long(sequence):
                    return sequence
        return None

    def _to_pause(self, owner: str, running: list[S], seats: Counter[str]) -> S | None:
        """The sequence to pause for one of the owner: the newest of the owner with the most, if it
        has at least two more, or if the owner has none and far fewer tokens."""
        most = max(seats, key=lambda each: (seats[each], self._served[each]))
        is_behind = self._served[owner] + QUANTUM < self._served[most]
        if seats[most] > seats[owner] + 1 or (not seats[owner] and is_behind):
            theirs = (s for s in running if s.request.owner == most)
            return max(theirs, key=lambda s: s.admitted_at)
        return None

    def plan(self) -> Plan[S]:
        """Decode everything that can; read some of the prompts."""
        plan = Plan(self.decode_order(), self._plan_prompts())
        for sequence in plan.decode:
            self._served[sequence.request.owner] += 1
        for sequence, count in plan.read:
            self._served[sequence.request.owner] += count
        return plan

    def decode_order(self) -> tuple[S, ...]:
        """The decoding sequences, in the order of their rows."""
        rows = sorted(self.decoding)
        return tuple(self.decoding[row] for row in rows if not self.decoding[row].is_paused)

    def _plan_prompts(self) -> tuple[tuple[S, int], ...]:
        """Pieces of prompts within the budget, at least one cut in any case."""
        ready, tokens = self._by_urgency(), self.pace.tokens
        alike = [s for s in ready if s.num_unread <= ALIKE * ready[0].num_unread]
        if self.decoding:
            alike = []
        else:
            tokens = max(tokens, EFFICIENT_TOKENS)
        tokens = max(self._cut, min(tokens, self._limits.prefill_chunk_tokens))
        share, logits = max(self._cut, tokens // max(1, len(alike))), self._max_logits
        pieces = list[tuple[S, int]]()
        for sequence in ready:
            is_scored, most = sequence.request.score_prompt, tokens
            if sequence in alike:
                most = min(most, share)
            count = sequence.next_piece(min(most, logits) if is_scored else most, self._cut)
            if count:
                pieces.append((sequence, count))
                tokens -= count
                logits -= count if is_scored else 0
        if pieces:
            self._num_plans += 1
            for sequence, _ in pieces:
                sequence.last_planned = self._num_plans
        return tuple(pieces)

    def _by_urgency(self) -> list[S]:
        """Prompts ready to be read; a long one that blocks a short one counts as short."""
        left = {id(s): s.num_unread for s in self.prefilling}
        for sequence in self.prefilling:
            reader: EngineSequence = sequence
            while reader.waits_for is not None:
                reader = reader.waits_for
            left[id(reader)] = min(left[id(reader)], sequence.num_unread)
        ready = [s for s in self.prefilling if s.waits_for is None and not s.is_paused]
        ready.sort(key=lambda s: (self._served[s.request.owner], left[id(s)]))
        if ready and self._num_plans % FAIRNESS_INTERVAL == 0:
            longest_waiting = min(ready, key=lambda s: s.last_planned)
            ready.remove(longest_waiting)
            ready.insert(0, longest_waiting)
        return ready

    def _is_long(self, sequence: S) -> bool:
        return sequence.num_unread > self._limits.prefill_chunk_tokens


def _deadline(sequence: EngineSequence) -> float:
    deadline = sequence.request.deadline
    return inf if deadline is None else deadline
