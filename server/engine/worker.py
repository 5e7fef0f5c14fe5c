"""The one thread that owns the device: `schedule -> run -> postprocess`, a step at a time."""

import logging
import time
from collections.abc import Callable

from model.checkpoint import Checkpoint
from model.decoding import runners
from model.state import DamagedState
from server.engine.inbox import Inbox
from server.engine.messages import (
    Cancel,
    DeadlinePassed,
    Ending,
    EngineMessage,
    Event,
    Failed,
    Finished,
    Forget,
    InvalidLogits,
    PromptScored,
    Release,
    RowDamaged,
    RowReleased,
    Stop,
    Submit,
)
from server.engine.prefill import PrefillRunner
from server.engine.rows import Rows
from server.engine.scheduler import EngineLimits, Plan, Scheduler
from server.engine.steps import FAILED, Outcomes, StepInFlight, Steps, end_of_prompt
from server.engine.text_sequence import End, TextSequence
from server.metrics import Metrics, exemplar

log = logging.getLogger(__name__)

IDLE_SAMPLE_S = 1.0
"""Interval at which an idle engine checks a retained row."""

SCORED_BYTES = 64 << 20
"""Memory for logits of scored prompts in a step."""

Deliver = Callable[[list[Event | RowReleased]], None]
"""Receives one step's events."""


class Worker:
    """The engine's loop, with its sequences, rows and network. Everything runs in the thread of
    `run`."""

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
        self._inbox = inbox
        self._deliver = deliver
        self._metrics = metrics
        max_logits = SCORED_BYTES // (4 * self._network.vocab_size)
        self._scheduler = Scheduler[TextSequence](limits, self._network.cut, max_logits)
        self._slots = self._scheduler.slots
        self._rows = Rows(self._network, self._slots, limits.warm_sessions)
        self._pool = self._rows.pool
        self._reader = PrefillRunner(
            self._network, self._pool, self._slots, limits.prefix_cache_bytes, metrics
        )
        self._runner = runners.new_runner(self._network, self._pool, limits.max_running)
        self._steps = Steps(self._runner, self._pool, metrics)
        self._flight: StepInFlight | None = None
        """The last launched step, if not yet collected."""

        self._events: list[Event | RowReleased] = []
        self._open: dict[str, None] = {}
        """Requests without a final event, oldest first."""

        self.step_started: float | None = None
        """Start of the current step, on the clock of `time.monotonic`."""

        self._num_sampled = 0
        self._stopping = False
        self._is_broken = False
        """The device is lost: the thread ends, and the server is no longer ready."""

    def run(self) -> None:
        """Work until stopped; sleep while there is nothing to do."""
        self._runner.prepare()
        self._report_slots()
        while not self._stopping:
            self.step()
        if self._is_broken:
            self._refuse_all()

    def step(self) -> None:
        """Run one step; wait for a message first if idle."""
        if self._scheduler.idle:
            self._slots.check()
        try:
            self._receive()
            self.step_started = time.monotonic()
            self._expire()
            self._admit()
            self._begin_decoding()
            self._run(self._scheduler.plan())
            for finished in self._rows.finished_exports(wait=self._scheduler.idle):
                self._end(finished)
        except Exception:  # whatever failed, no client may wait forever
            log.exception("an engine step failed")
            self._fail_all()
        self.step_started = None
        self._flush()

    def _run(self, plan: Plan[TextSequence]) -> None:
        outcomes = Outcomes()
        batch = [(self._row(sequence), sequence) for sequence in plan.decode]
        prompts = [(self._row(sequence), sequence, count) for sequence, count in plan.read]
        ready = self._steps.find_ready(batch, outcomes)
        prompts = self._steps.find_readable(prompts, outcomes)
        self._apply(outcomes)
        before, self._flight = self._flight, self._steps.launch(ready, prompts)
        for row, sequence, _ in prompts:
            self._reader.retain(sequence)
            if sequence.is_read:
                self._stop_prefill(sequence)
                self._scheduler.decoding[row] = sequence
        if before is not None:
            self._land(before)
        is_last = not (self._scheduler.decoding or self._scheduler.prefilling)
        if self._flight is not None and (is_last or not self._steps.runs_ahead):
            self._land(self._flight)
            self._flight = None

    def _land(self, flight: StepInFlight) -> None:
        running = dict(self._scheduler.decoding)
        running |= {self._row(sequence): sequence for sequence in self._scheduler.prefilling}
        outcomes = self._steps.collect(flight, running)
        if flight.num_prompt_tokens:
            self._scheduler.pace.observe(flight.num_prompt_tokens, self._steps.last_s)
        self._apply(outcomes)

    def _apply(self, outcomes: Outcomes) -> None:
        """Report the step's texts and completed prompts, and finish sequences that ended."""
        for sequence in outcomes.read:
            self._report_read(sequence)
        self._events += outcomes.texts
        for sequence, outcome in outcomes.ended:
            if isinstance(outcome, End):
                self._finish(sequence, outcome)
            else:
                is_damaged = isinstance(outcome, InvalidLogits)
                ending = self._find_damage(sequence) if is_damaged else outcome
                self._drop(sequence)
                self._end(ending)

    def _find_damage(self, sequence: TextSequence) -> InvalidLogits | RowDamaged:
        """Determine why a sequence's logits were not finite. Called before it is dropped."""
        request_id = sequence.request.request_id
        try:
            self._pool.check_row(self._row(sequence))
        except DamagedState as error:
            self._metrics.damaged_states_total.labels(found="turn").inc()
            self._reader.drop_retained()
            log.error("the state of a running turn is damaged: %s", error)
            is_imported = sequence.request.source is not None and not sequence.is_adopted
            if sequence.num_generated or not is_imported:
                return RowDamaged(request_id, str(error))
        return InvalidLogits(request_id)

    def _receive(self) -> None:
        idle = self._scheduler.idle
        if idle:
            self._steps.rest()
        if idle and self._inbox.empty:
            self._report_slots()
        samples = idle and bool(self._slots.retained)
        for message in self._inbox.receive(wait=idle, timeout_s=IDLE_SAMPLE_S if samples else None):
            samples = False
            self._handle(message)
        if samples:
            self._sample()

    def _sample(self) -> None:
        """Check one retained row, in rotation; release it if damaged."""
        self._num_sampled += 1
        retained = self._slots.retained
        state_id = retained[self._num_sampled % len(retained)]
        try:
            magnitude = self._pool.check_row(self._slots.row(state_id))
        except DamagedState as error:
            self._metrics.damaged_states_total.labels(found="idle").inc()
            log.error("a retained state on the device is damaged: %s", error)
            self._rows.release(state_id)
        else:
            self._metrics.state_magnitude.observe(magnitude)

    def _handle(self, message: EngineMessage) -> None:
        match message:
            case Submit(request) if request.is_anticipated and not self._scheduler.has_seat:
                self._inbox.left_queue(request)
            case Submit(request, at):
                self._open[request.request_id] = None
                try:
                    sequence = TextSequence(request, self._tokenizer, at, self._network.eos)
                    sequence.check_ids(self._network.vocab_size)
                except (ValueError, OverflowError) as error:
                    self._inbox.left_queue(request)
                    self._end(Failed(request.request_id, str(error)))
                else:
                    self._scheduler.add(sequence)
            case Cancel(request_id):
                self._open.pop(request_id, None)
                found = self._scheduler.find(request_id)
                if found is not None:
                    self._drop(found)
            case Release(state_id):
                self._rows.release(state_id)
            case Forget(owner):
                self._reader.forget_owner(owner)
                self._drop_anticipated(owner)
            case Stop():
                self._stopping = True

    def _drop_anticipated(self, owner: str) -> None:
        for sequence in list(self._scheduler.sequences()):
            request = sequence.request
            if request.is_anticipated and request.owner == owner:
                self._open.pop(request.request_id, None)
                self._drop(sequence)

    def _expire(self) -> None:
        for sequence in self._scheduler.expired(time.monotonic()):
            self._drop(sequence)
            self._end(DeadlinePassed(sequence.request.request_id))

    def _admit(self) -> None:
        while (sequence := self._scheduler.admit()) is not None:
            request = sequence.request
            self._inbox.left_queue(request)
            sequence.admitted_at = time.monotonic()
            queued_s = sequence.admitted_at - sequence.submitted_at
            self._metrics.queue_time_seconds.observe(queued_s, exemplar(request.client_id))
            try:
                sequence.is_adopted = self._rows.load(request)
            except ValueError as error:
                self._drop(sequence)
                self._end(Failed(request.request_id, str(error)))
                continue
            if request.source is None or request.source.is_initial:
                self._reader.begin(sequence)
        self._metrics.requests_waiting.set(len(self._scheduler.waiting))

    def _begin_decoding(self) -> None:
        """Start decoding prompts with nothing left to prefill, or end them."""
        for sequence in [s for s in self._scheduler.prefilling if s.is_read]:
            self._stop_prefill(sequence)
            request = sequence.request
            if request.max_tokens and not sequence.unread and not request.continuation.position:
                self._drop(sequence)
                self._end(Failed(request.request_id, "there is no token to read"))
                continue
            self._report_read(sequence)
            if sequence.generates:
                self._scheduler.decoding[self._row(sequence)] = sequence
            else:
                self._finish(sequence, end_of_prompt(sequence))

    def _report_read(self, sequence: TextSequence) -> None:
        """The whole prompt is read, except for what the first decoding step reads."""
        sequence.read_at = time.monotonic()
        if sequence.request.is_anticipated:
            return
        self._metrics.prefill_time_seconds.observe(sequence.read_at - sequence.admitted_at)
        self._reader.count(sequence)
        scores = sequence.prompt_scores
        if scores is not None:
            request_id = sequence.request.request_id
            self._events.append(PromptScored(request_id, tuple(scores.tokens)))
            sequence.prompt_scores = None  # already reported, and may be large

    def _stop_prefill(self, sequence: TextSequence) -> None:
        self._scheduler.prefilling.remove(sequence)
        self._reader.leave(sequence)

    def _finish(self, sequence: TextSequence, end: End) -> None:
        """Finish a turn: export its state, retain or free its row."""
        request = sequence.request
        self._stop_decoding(sequence)
        text, tokens = sequence.text.flush()
        finished = Finished(
            request_id=request.request_id,
            text=text,
            reason=end.reason,
            num_generated=sequence.num_generated,
            timings=sequence.timings(),
            tokens=tokens,
            stopped_by=end.stopped_by,
            cached_tokens=sequence.cached_tokens,
            continuation=None if request.retain_as is None else sequence.continuation(),
            retained_as=request.retain_as,
        )
        if request.caches_answer:
            self._reader.cache_answer(sequence)
        if request.retain_as is None:
            self._rows.free(request.request_id)
            self._end(finished)
        else:
            self._rows.start_export(finished, request.retain_as, request.owner)

    def _drop(self, sequence: TextSequence) -> None:
        """Drop a sequence in any phase and free its row."""
        request = sequence.request
        if sequence in self._scheduler.waiting:
            self._scheduler.waiting.remove(sequence)
            self._inbox.left_queue(request)
            return
        if sequence in self._scheduler.prefilling:
            self._stop_prefill(sequence)
        self._stop_decoding(sequence)
        self._rows.free(request.request_id)

    def _stop_decoding(self, sequence: TextSequence) -> None:
        """Remove the sequence from decoding, if it is there."""
        row = self._row(sequence)
        if self._scheduler.decoding.get(row) is sequence:
            del self._scheduler.decoding[row]

    def _fail_all(self) -> None:
        """Fail every request after an error in a step, when any state may be incomplete.

        Retained states are dropped, too: one may have been on its way to another row.
        """
        scheduler = self._scheduler
        for sequence in scheduler.waiting:
            self._inbox.left_queue(sequence.request)
        for phase in (scheduler.waiting, scheduler.prefilling, scheduler.decoding):
            phase.clear()
        self._flight = None
        self._reader.forget()
        self._rows.reset_all()
        for request_id in list(self._open):
            self._end(Failed(request_id, FAILED))
        if not self._pool.responds:
            log.critical("the device does not respond any more: the engine stops")
            self._is_broken = self._stopping = True

    def _refuse_all(self) -> None:
        """Fail requests that arrive after the engine broke."""
        for message in self._inbox.receive(wait=False):
            if isinstance(message, Submit):
                self._inbox.left_queue(message.request)
                self._end(Failed(message.request.request_id, FAILED))
        self._flush()

    def _end(self, event: Ending) -> None:
        """Report a request's final event."""
        self._open.pop(event.request_id, None)
        self._events.append(event)

    def _row(self, sequence: TextSequence) -> int:
        return self._slots.row(sequence.request.request_id)

    def _flush(self) -> None:
        running = len(self._scheduler.prefilling) + len(self._scheduler.decoding)
        self._metrics.requests_running.set(running)
        self._events += self._slots.drain_released()
        if self._events:
            self._report_slots()
            events, self._events = self._events, []
            self._deliver(events)

    def _report_slots(self) -> None:
        slots = self._slots
        counts = {"free": slots.num_free, "running": slots.num_active, "warm": slots.num_retained}
        for state, count in counts.items():
            self._metrics.slots.labels(state=state).set(count)
