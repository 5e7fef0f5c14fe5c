"""The one thread that owns the device: `schedule -> run -> postprocess`, a step at a time."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace
from typing import Literal

from model.checkpoint import Checkpoint
from model.decoding import Launched
from model.logprobs import Scored
from model.transfer import Export, new_transfer
from server.engine.inbox import Inbox
from server.engine.messages import (
    Cancel,
    DeadlinePassed,
    Ending,
    EngineRequest,
    Event,
    Evicted,
    Failed,
    Finished,
    Fresh,
    GrammarFailed,
    Message,
    NoProbabilities,
    Parked,
    PromptScored,
    Release,
    StateMissing,
    Stop,
    Submit,
    TextDelta,
    Token,
    Warm,
)
from server.engine.reading import PromptReader
from server.engine.scheduler import EngineLimits, Plan, Scheduler
from server.engine.sequence import Sequence
from server.metrics import Metrics

log = logging.getLogger(__name__)

FAILED = "the engine failed while computing; see the server's log"


@dataclass(frozen=True)
class End:
    """Why a turn ends."""

    reason: Literal["stop", "length"]
    stopped_by: str | int | None = None
    """As in `Finished`."""


@dataclass(frozen=True)
class Flight:
    """A step that is under way."""

    batch: Row[tuple[int, Sequence]]
    """The sequences with their rows."""

    launched: Launched
    started: float


Deliver = Callable[[list[Event | Evicted]], None]
"""Takes one step's events."""


class Worker:
    """Sequences, their rows and the network. Everything here runs in the thread of `run`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: EngineLimits,
        inbox: Inbox,
        deliver: Deliver,
        metrics: Metrics,
    ) -> None:
        self._network = checkpoint.network
        self._tokenizer = checkpoint.tokenizer
        self._limits = limits
        self._inbox = inbox
        self._deliver = deliver
        self._metrics = metrics
        self._scheduler = Scheduler(limits, self._network.chunk)
        self._slots = self._scheduler.slots
        self._pool = self._network.new_pool(1 + self._slots.num_rows)
        self._erase_all()
        self._reader = PromptReader(
            self._network, self._pool, self._slots, limits.prefix_cache_bytes, metrics
        )
        self._decoder = self._network.new_decoder(self._pool, limits.max_running)
        self._transfer = new_transfer(self._pool)
        self._departing = deque[tuple[Finished, Export]]()
        """Turns that have ended and whose states are on their way to the host, in this order."""

        self._flight: Flight | None = None
        """The step that was launched last, if its tokens have not been taken."""

        self._events: list[Event | Evicted] = []
        self._open: dict[str, None] = {}
        """Requests that have not been told their end, oldest first."""

        self._num_warm_names = 0
        self._stopping = False
        self._is_broken = False
        """The device is lost: the thread ends, and a server without it is not ready."""

    def run(self) -> None:
        """Work until told to stop; sleep while there is nothing to do."""
        self._decoder.prepare()
        self._report_slots()
        while not self._stopping:
            self.step()
        if self._is_broken:
            self._refuse_all()

    def step(self) -> None:
        """Do what there is to do now; wait for a message first if that is nothing."""
        if self._scheduler.idle:
            self._slots.check()
        try:
            self._receive()
            self._expire()
            self._admit()
            self._finish_reading()
            self._run(self._scheduler.plan())
            self._tell_departed()
        except Exception:  # whatever failed, no client may wait for ever
            log.exception("an engine step failed")
            self._fail_all()
        self._flush()

    def _run(self, plan: Plan) -> None:
        if plan.prefill:
            self._reader.read(plan.prefill)
            self._finish_reading()
        before, self._flight = self._flight, self._launch(plan.decode)
        if before is not None:
            self._land(before)
        ended = not self._scheduler.decoding
        if self._flight is not None and (ended or not self._decoder.runs_ahead):
            self._land(self._flight)
            self._flight = None

    def _receive(self) -> None:
        idle = self._scheduler.idle
        if idle and self._inbox.empty:
            self._report_slots()
        for message in self._inbox.take(wait=idle):
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request, at):
                self._open[request.request_id] = None
                try:
                    config = self._network.config
                    sequence = Sequence(request, self._tokenizer, at, config.eos_token_ids)
                    sequence.check_ids(config.vocab_sz)
                except (ValueError, OverflowError) as error:
                    self._inbox.waits_no_more(request)
                    self._end(Failed(request.request_id, str(error)))
                else:
                    self._scheduler.add(sequence)
            case Cancel(request_id):
                self._open.pop(request_id, None)
                found = self._scheduler.find(request_id)
                if found is not None:
                    self._drop(found)
            case Release(name):
                if self._slots.is_warm(name):
                    self._free(name)
            case Stop():
                self._stopping = True

    def _expire(self) -> None:
        for sequence in self._scheduler.expired(time.monotonic()):
            self._drop(sequence)
            self._end(DeadlinePassed(sequence.request.request_id))

    def _admit(self) -> None:
        while (sequence := self._scheduler.admit()) is not None:
            request = sequence.request
            self._inbox.waits_no_more(request)
            sequence.admitted_at = time.monotonic()
            queued_s = sequence.admitted_at - sequence.submitted_at
            self._metrics.queue_time_seconds.observe(queued_s)
            try:
                placed = self._place(sequence)
            except ValueError as error:
                self._fail(sequence, str(error))
                continue
            if not placed:
                self._scheduler.reading.remove(sequence)
                self._end(StateMissing(request.request_id))
        self._events.extend(map(Evicted, self._slots.take_evicted()))
        self._metrics.requests_waiting.set(len(self._scheduler.waiting))

    def _place(self, sequence: Sequence) -> bool:
        """Give the sequence a row with its state; False if the warm state is gone."""
        owner = sequence.request.request_id
        match sequence.request.source:
            case Warm(name):
                return self._slots.adopt(name, owner)
            case Parked(state):
                self._transfer.import_row(self._slots.acquire(owner), state)
            case Fresh():
                self._pool.reset(self._slots.acquire(owner))
                self._reader.begin(sequence)
        return True

    def _finish_reading(self) -> None:
        """Prompts that but for their last token are in the state: begin to decode, or end here."""
        for sequence in [s for s in self._scheduler.reading if s.is_read]:
            self._stop_reading(sequence)
            request = sequence.request
            sequence.read_at = time.monotonic()
            self._metrics.prefill_time_seconds.observe(sequence.read_at - sequence.admitted_at)
            self._reader.count(sequence)
            scores = sequence.prompt_scores
            if scores is not None and scores.is_damaged:
                self._drop(sequence)
                self._end(NoProbabilities(request.request_id))
                continue
            if request.max_tokens and not sequence.unread:
                self._fail(sequence, "there is no token to read")
                continue
            if scores is not None:
                self._events.append(PromptScored(request.request_id, tuple(scores.tokens)))
                sequence.prompt_scores = None  # they are told, and may be large
            if request.max_tokens == 0:
                self._finish(sequence, End("length"))
            else:
                self._scheduler.decoding[self._row(sequence)] = sequence

    def _stop_reading(self, sequence: Sequence) -> None:
        self._scheduler.reading.remove(sequence)
        self._reader.leave(sequence)

    def _launch(self, decode: Row[Sequence]) -> Flight | None:
        """Launch the next step of all that can go on."""
        ready = [sequence for sequence in decode if self._can_go_on(sequence)]
        if not ready:
            return None
        started = time.monotonic()
        batch = [(self._row(sequence), sequence) for sequence in ready]
        launched = self._decoder.launch([sequence.decode_input(row) for row, sequence in batch])
        for sequence in ready:
            sequence.num_in_flight += 1
        self._metrics.batch_size.set(len(batch))
        return Flight(batch, launched, started)

    def _can_go_on(self, sequence: Sequence) -> bool:
        """Whether a step can be launched for it now. Where a grammar says it, find out what may
        come next, and end what is complete."""
        if sequence.num_in_flight:
            return self._decoder.runs_ahead and sequence.can_run_ahead
        if sequence.matcher is None:
            return True
        reason = sequence.find_allowed()
        if reason is not None:
            self._drop(sequence)
            self._end(GrammarFailed(sequence.request.request_id, reason))
        elif sequence.matcher.is_complete:
            self._finish(sequence, End("stop"))
        else:
            return True
        return False

    def _land(self, flight: Flight) -> None:
        """Take the tokens of a step, except of sequences that have ended since its launch."""
        decoded = flight.launched.take()
        now = time.monotonic()
        self._metrics.step_duration_seconds.observe(now - flight.started)
        num_tokens, waited = 0, Counter[float]()
        decoding, scored = self._scheduler.decoding, decoded.scored
        for i, (row, sequence) in enumerate(flight.batch):
            sequence.num_in_flight -= 1
            if decoding.get(row) is not sequence:
                continue
            token_id = decoded.token_ids[i]
            if token_id is None or (scored and scored.get(i, self) is None):
                self._drop(sequence)
                self._end(NoProbabilities(sequence.request.request_id))
                continue
            num_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = now
                self._metrics.time_to_first_token_seconds.observe(now - sequence.submitted_at)
            else:
                waited[sequence.last_token_at] += 1
            sequence.last_token_at = now
            try:
                end = self._advance(sequence, token_id, scored.get(i), row)
            except Exception:  # of this sequence's text: the others are as they should be
                log.exception("a token could not be added to its text")
                self._fail(sequence, FAILED)
                continue
            if end is not None:
                self._finish(sequence, end)
        self._metrics.generation_tokens_total.inc(num_tokens)
        for since, count in waited.items():
            self._metrics.inter_token_latency_seconds.observe(now - since, count)

    def _advance(
        self, sequence: Sequence, token_id: int, scored: Scored | None, row: int
    ) -> End | None:
        """One sampled token of one sequence, of which alone it touches text and state.

        Returns why the turn ends, if it does.
        """
        sequence.num_generated += 1
        request = sequence.request
        ends = token_id in sequence.end_token_ids
        if ends and not (request.include_stop and token_id in request.stop_token_ids):
            return _end_by(token_id, request)
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)  # what fails here is told before the next token
        stop = None
        if sequence.has_only_text:
            text = sequence.push_only_text(token_id)
            self._events.append(TextDelta(request.request_id, text))
            self._append(sequence, token_id, ends=ends)
        else:
            stop = self._push_text(sequence, _token(token_id, scored), row, ends=ends)
        if stop is not None:
            return End("stop", stop)
        if ends:
            return _end_by(token_id, request)
        return End("length") if sequence.num_generated >= request.max_tokens else None

    def _push_text(self, sequence: Sequence, token: Token, row: int, *, ends: bool) -> str | None:
        """Add a token's text, of which some may have to be held back, and the token.

        Returns the stop string that the text ends with, if it does.
        """
        step = sequence.push_text(token)
        if step.wants_anchor:
            sequence.set_anchor(self._pool.read_row(row))
        if step.cuts_token:
            state = sequence.cut()
            if state is not None:
                self._pool.write_row(row, state)
        else:
            self._append(sequence, token.token_id, ends=ends)
        self._events.append(TextDelta(sequence.request.request_id, step.text, step.tokens))
        return step.stop

    def _append(self, sequence: Sequence, token_id: int, *, ends: bool) -> None:
        sequence.append(token_id)
        if sequence.num_in_flight and not ends:  # the step that was launched ahead reads it
            sequence.take(1)

    def _finish(self, sequence: Sequence, end: End) -> None:
        """End a turn: hand its state out, keep or free its row."""
        request, slots = sequence.request, self._slots
        owner, export, continuation, warm = request.request_id, None, None, None
        self._stop_decoding(sequence)
        if request.keep_state:
            export = self._transfer.export_row(slots.row(owner))
            continuation = sequence.continuation()
        if request.keep_state and self._limits.warm_sessions:
            self._num_warm_names += 1
            warm = f"warm-{self._num_warm_names}"
            slots.keep_warm(owner, warm)
        else:
            self._free(owner)
        text, tokens = sequence.flush()
        finished = Finished(
            request_id=owner,
            text=text,
            reason=end.reason,
            num_generated=sequence.num_generated,
            timings=sequence.timings(),
            tokens=tokens,
            stopped_by=end.stopped_by,
            cached_tokens=sequence.cached_tokens,
            continuation=continuation,
            warm=warm,
        )
        if export is None:
            self._end(finished)
        else:
            self._departing.append((finished, export))

    def _tell_departed(self) -> None:
        """Tell the ends of turns whose states have come; wait for them if nothing else is left."""
        waits = self._scheduler.idle
        while self._departing and (waits or self._departing[0][1].is_done):
            finished, export = self._departing.popleft()
            warm = finished.warm
            if warm is not None and not self._slots.is_warm(warm):
                warm = None  # another sequence needed the row meanwhile
            self._end(replace(finished, state=export.take(), warm=warm))

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End one sequence with an error; the others go on."""
        self._drop(sequence)
        self._end(Failed(sequence.request.request_id, message))

    def _drop(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is and free its row, also one that waits for it."""
        request = sequence.request
        if sequence in self._scheduler.waiting:
            self._scheduler.waiting.remove(sequence)
            self._inbox.waits_no_more(request)
            if isinstance(request.source, Warm) and self._slots.is_warm(request.source.name):
                self._free(request.source.name)
            return
        if sequence in self._scheduler.reading:
            self._stop_reading(sequence)
        self._stop_decoding(sequence)
        self._free(request.request_id)

    def _free(self, owner: str) -> None:
        """Free a row and erase the state in it: free rows hold nobody's."""
        self._pool.poison(self._slots.release(owner))

    def _erase_all(self) -> None:
        for row in range(self._pool.num_rows):
            self._pool.poison(row)

    def _stop_decoding(self, sequence: Sequence) -> None:
        """Take the sequence out of those that decode, if it is among them."""
        row = self._row(sequence)
        if self._scheduler.decoding.get(row) is sequence:
            del self._scheduler.decoding[row]

    def _fail_all(self) -> None:
        """After an error in a step nobody knows which states are whole: end every request.

        Warm states are forgotten, too: one may have been on its way to another row.
        """
        scheduler = self._scheduler
        for sequence in scheduler.waiting:
            self._inbox.waits_no_more(sequence.request)
        for phase in (scheduler.waiting, scheduler.reading, scheduler.decoding):
            phase.clear()
        self._flight = None
        self._departing.clear()
        self._slots.release_all()
        self._events.extend(map(Evicted, self._slots.take_evicted()))
        self._reader.forget()
        for request_id in list(self._open):
            self._end(Failed(request_id, FAILED))
        try:
            self._erase_all()
        except Exception:  # who gets a row overwrites it, if anybody ever does
            log.exception("free rows could not be erased")
        if not self._pool.responds:
            log.critical("the device does not answer any more: the engine ends")
            self._is_broken = self._stopping = True

    def _refuse_all(self) -> None:
        """Tell those that came too late for a broken engine."""
        for message in self._inbox.take(wait=False):
            if isinstance(message, Submit):
                self._inbox.waits_no_more(message.request)
                self._end(Failed(message.request.request_id, FAILED))
        self._flush()

    def _end(self, event: Ending) -> None:
        """Tell a request's last event."""
        self._open.pop(event.request_id, None)
        self._events.append(event)

    def _row(self, sequence: Sequence) -> int:
        return self._slots.row(sequence.request.request_id)

    def _flush(self) -> None:
        running = len(self._scheduler.reading) + len(self._scheduler.decoding)
        self._metrics.requests_running.set(running)
        if self._events:
            self._report_slots()
            events, self._events = self._events, []
            self._deliver(events)

    def _report_slots(self) -> None:
        slots = self._slots
        counts = {"free": slots.num_free, "running": slots.num_active, "warm": slots.num_warm}
        for state, count in counts.items():
            self._metrics.slots.labels(state=state).set(count)


def _end_by(token_id: int, request: EngineRequest) -> End:
    """The end by a token: the client's own, or the model's."""
    return End("stop", token_id if token_id in request.stop_token_ids else None)


def _token(token_id: int, scored: Scored | None) -> Token:
    """The token with its probabilities, where they were asked for."""
    return Token(token_id) if scored is None else Token(token_id, scored.logprob, scored.top)
