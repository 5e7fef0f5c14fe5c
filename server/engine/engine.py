"""The one thread that owns the device: `schedule -> run -> postprocess`, a step at a time."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from model.checkpoint import Checkpoint
from model.sampling import sample
from server.engine.messages import (
    EngineRequest,
    Event,
    Evicted,
    Failed,
    Finished,
    Fresh,
    Parked,
    StateMissing,
    TextDelta,
    Warm,
)
from server.engine.scheduler import EngineLimits, Plan, Scheduler
from server.engine.sequence import Sequence
from server.errors import Overloaded
from server.metrics import Metrics

__all__ = ["Engine", "EngineLimits"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Submit:
    request: EngineRequest
    at: float


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Release:
    name: str


class _Stop:
    pass


class Engine:
    """Runs requests on a checkpoint's network. All public methods may be called from any thread.

    `deliver` is called in the engine's thread, at most once a step, with that step's events. After
    a cancelled request no event of it is delivered that was not on its way already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: EngineLimits,
        deliver: Callable[[list[Event | Evicted]], None],
        metrics: Metrics,
    ) -> None:
        self._network = checkpoint.network
        self._tokenizer = checkpoint.tokenizer
        self._limits = limits
        self._deliver = deliver
        self._metrics = metrics
        self._scheduler = Scheduler(limits)
        self._pool = self._network.new_pool(1 + self._scheduler.slots.num_rows)
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Release | _Stop] = queue.SimpleQueue()
        self._events: list[Event | Evicted] = []
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._num_warm_names = 0
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._stopping = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the present step; what still runs gets no further events."""
        self._inbox.put(_Stop())
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, *requests: EngineRequest) -> None:
        """Queue requests, all or none. Raises Overloaded when the queue is full."""
        with self._lock:
            if self._num_waiting + len(requests) > self._limits.max_waiting:
                raise Overloaded(f"{self._num_waiting} requests are waiting already")
            self._num_waiting += len(requests)
        now = time.monotonic()
        for request in requests:
            self._inbox.put(_Submit(request, now))

    def cancel(self, request_id: str) -> None:
        """Abandon a request in whatever phase it is; unknown and finished ones are ignored."""
        self._inbox.put(_Cancel(request_id))

    def release(self, name: str) -> None:
        """Forget a warm state; unknown names are ignored."""
        self._inbox.put(_Release(name))

    def _main(self) -> None:
        self._report_slots()
        while not self._stopping:
            self._receive()
            try:
                self._admit()
                plan = self._scheduler.plan()
                self._run(plan)
            except Exception:  # whatever failed, no client may wait for ever
                log.exception("an engine step failed")
                self._fail_all("the engine failed while computing; see the server's log")
            self._flush()

    def _receive(self) -> None:
        """Take what arrived; sleep while there is nothing to do."""
        if self._scheduler.idle and self._inbox.empty():
            self._scheduler.slots.check()
            self._report_slots()
            self._handle(self._inbox.get())
        with contextlib.suppress(queue.Empty):
            while True:
                self._handle(self._inbox.get_nowait())

    def _handle(self, message: _Submit | _Cancel | _Release | _Stop) -> None:
        match message:
            case _Submit(request, at):
                self._scheduler.waiting.append(Sequence(request, self._tokenizer, at))
            case _Cancel(request_id):
                sequence = self._scheduler.find(request_id)
                if sequence is not None:
                    self._remove(sequence)
            case _Release(name):
                if self._scheduler.slots.is_warm(name):
                    self._scheduler.slots.release(name)
            case _Stop():
                self._stopping = True

    def _admit(self) -> None:
        while (sequence := self._scheduler.next_to_admit()) is not None:
            self._count_waiting(-1)
            request = sequence.request
            try:
                placed = self._place(request)
            except ValueError as error:
                self._scheduler.slots.release(request.request_id)
                self._events.append(Failed(request.request_id, str(error)))
                continue
            if not placed:
                self._events.append(StateMissing(request.request_id))
                continue
            sequence.admitted_at = time.monotonic()
            queued_s = sequence.admitted_at - sequence.submitted_at
            self._metrics.queue_time_seconds.observe(queued_s)
            self._scheduler.reading.append(sequence)
            if sequence.is_read:
                self._finish_reading(sequence)
        self._events.extend(map(Evicted, self._scheduler.slots.take_evicted()))
        self._metrics.requests_waiting.set(len(self._scheduler.waiting))

    def _place(self, request: EngineRequest) -> bool:
        """Give the request a row with its state; False if the warm state is gone."""
        slots, owner = self._scheduler.slots, request.request_id
        match request.source:
            case Warm(name):
                return slots.adopt(name, owner)
            case Parked(state):
                self._pool.import_row(slots.acquire(owner), state)
            case Fresh():
                self._pool.reset(slots.acquire(owner))
        return True

    def _run(self, plan: Plan) -> None:
        if plan.prefill:
            self._prefill(plan)
        if plan.decode:
            self._decode(plan)

    def _prefill(self, plan: Plan) -> None:
        longest = max(count for _, count in plan.prefill)
        ids = torch.zeros(len(plan.prefill), longest, dtype=torch.long)
        for i, (sequence, count) in enumerate(plan.prefill):
            ids[i, :count] = torch.tensor(sequence.take(count))
        rows = [self._scheduler.slots.row(s.request.request_id) for s, _ in plan.prefill]
        lengths = [count for _, count in plan.prefill]
        self._network.prefill(ids.to(self._pool.device), lengths, self._pool, rows)
        for sequence, _ in plan.prefill:
            if sequence.is_read:
                self._finish_reading(sequence)

    def _finish_reading(self, sequence: Sequence) -> None:
        """The prompt but its last token is in the state: begin to decode, or end here."""
        self._scheduler.reading.remove(sequence)
        sequence.read_at = time.monotonic()
        self._metrics.prefill_time_seconds.observe(sequence.read_at - sequence.admitted_at)
        self._metrics.prompt_tokens_total.inc(len(sequence.request.token_ids))
        if sequence.request.max_tokens == 0:
            self._finish(sequence, "length")
        elif not sequence.unread:
            self._events.append(Failed(sequence.request.request_id, "there is no token to read"))
            self._scheduler.slots.release(sequence.request.request_id)
        else:
            self._pool.swap(*self._scheduler.slots.begin_decoding(sequence.request.request_id))
            row = self._scheduler.slots.row(sequence.request.request_id)
            self._scheduler.decoding[row] = sequence

    def _decode(self, plan: Plan) -> None:
        started = time.monotonic()
        rows = [self._scheduler.slots.row(s.request.request_id) for s in plan.decode]
        inputs = [sequence.take(1)[0] for sequence in plan.decode]
        ids = torch.tensor(inputs, device=self._pool.device)
        logits = self._network.step(ids, self._pool, rows)
        sampled = sample(logits, [sequence.sampled_row for sequence in plan.decode])
        now = time.monotonic()
        self._metrics.step_duration_seconds.observe(now - started)
        self._metrics.batch_size.set(len(rows))
        self._metrics.generation_tokens_total.inc(len(rows))
        for sequence, token_id in zip(plan.decode, sampled, strict=True):
            self._advance(sequence, token_id, now)

    def _advance(self, sequence: Sequence, token_id: int, now: float) -> None:
        """One sampled token of one sequence."""
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.time_to_first_token_seconds.observe(now - sequence.submitted_at)
        else:
            self._metrics.inter_token_latency_seconds.observe(now - sequence.last_token_at)
        sequence.last_token_at = now
        sequence.num_generated += 1
        request = sequence.request
        if token_id in self._network.config.eos_token_ids and not request.ignore_eos:
            self._finish(sequence, "stop")
            return
        step = sequence.push_text(token_id)
        row = self._scheduler.slots.row(request.request_id)
        if step.wants_anchor:
            sequence.set_anchor(self._pool.read_row(row))
        if step.stopped:
            state = sequence.cut()
            if state is not None:
                self._pool.write_row(row, state)
        else:
            sequence.append(token_id)
        self._events.append(TextDelta(request.request_id, step.text))
        if step.stopped:
            self._finish(sequence, "stop")
        elif sequence.num_generated >= request.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: Literal["stop", "length"]) -> None:
        """End a turn: hand its state out, keep or free its row."""
        request, slots = sequence.request, self._scheduler.slots
        owner, state, continuation, warm = request.request_id, None, None, None
        self._stop_decoding(sequence)
        if request.keep_state:
            state = self._pool.export_row(slots.row(owner))
            continuation = sequence.continuation()
        if request.keep_state and self._limits.warm_sessions:
            self._num_warm_names += 1
            warm = f"warm-{self._num_warm_names}"
            slots.keep_warm(owner, warm)
        else:
            slots.release(owner)
        self._events.append(
            Finished(
                request_id=owner,
                text=sequence.flush(),
                reason=reason,
                num_generated=sequence.num_generated,
                timings=sequence.timings(),
                state=state,
                continuation=continuation,
                warm=warm,
            )
        )

    def _remove(self, sequence: Sequence) -> None:
        """Drop a sequence in whatever phase it is, with its row."""
        if sequence in self._scheduler.waiting:
            self._scheduler.waiting.remove(sequence)
            self._count_waiting(-1)
            return
        if sequence in self._scheduler.reading:
            self._scheduler.reading.remove(sequence)
        self._stop_decoding(sequence)
        self._scheduler.slots.release(sequence.request.request_id)

    def _stop_decoding(self, sequence: Sequence) -> None:
        """Take the sequence out of the decoding block; the block's last one takes its row."""
        decoding = self._scheduler.decoding
        row = next((row for row, other in decoding.items() if other is sequence), None)
        if row is None:
            return
        del decoding[row]
        a, b = self._scheduler.slots.end_decoding(sequence.request.request_id)
        self._pool.swap(a, b)
        if a != b:
            decoding[a] = decoding.pop(b)

    def _fail_all(self, message: str) -> None:
        """After an error in a step nobody knows which states are whole: end every sequence."""
        for sequence in list(self._scheduler.sequences()):
            self._remove(sequence)
            self._events.append(Failed(sequence.request.request_id, message))

    def _count_waiting(self, change: int) -> None:
        with self._lock:
            self._num_waiting += change

    def _flush(self) -> None:
        running = len(self._scheduler.reading) + len(self._scheduler.decoding)
        self._metrics.requests_running.set(running)
        if self._events:
            self._report_slots()
            events, self._events = self._events, []
            self._deliver(events)

    def _report_slots(self) -> None:
        slots = self._scheduler.slots
        counts = {"free": slots.num_free, "running": slots.num_active, "warm": slots.num_warm}
        for state, count in counts.items():
            self._metrics.slots.labels(state=state).set(count)
