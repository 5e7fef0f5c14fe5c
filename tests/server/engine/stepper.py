"""The engine's worker without its thread: a test runs each step, and inspects every row."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from model.checkpoint import Checkpoint
from server.engine.inbox import Inbox
from server.engine.messages import (
    Cancel,
    EngineRequest,
    Event,
    Finished,
    Release,
    RowReleased,
    Submit,
    TextDelta,
)
from server.engine.scheduler import EngineLimits
from server.engine.worker import Worker
from server.metrics import Metrics
from tests.server.engine.driver import LIMITS, is_last, request

MAX_STEPS = 1000
"""More than any test needs."""

SMALL = replace(
    LIMITS,
    max_running=2,
    warm_sessions=1,
    prefill_chunk_tokens=32,
)
"""Three rows, two of which may run."""


class Clock:
    """Replaces the module `time` in the worker; the test sets the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Stepper:
    """A worker, its inbox, and the events it delivered."""

    def __init__(self, checkpoint: Checkpoint, limits: EngineLimits = LIMITS) -> None:
        self.inbox = Inbox(limits.max_waiting, limits.max_waiting_tokens)
        self.delivered: list[Event | RowReleased] = []
        self.metrics = Metrics()
        self.worker = Worker(checkpoint, limits, self.inbox, self.delivered.extend, self.metrics)
        self.pool = self.worker._pool
        self.slots = self.worker._slots
        self.scheduler = self.worker._scheduler

    def submit(self, *requests: EngineRequest) -> None:
        self.inbox.submit(*(Submit(request, 0.0) for request in requests))

    def cancel(self, request_id: str) -> None:
        self.inbox.put(Cancel(request_id))

    def release(self, state_id: str) -> None:
        self.inbox.put(Release(state_id))

    @property
    def has_work(self) -> bool:
        return not (self.scheduler.idle and self.inbox.empty)

    def step(self, count: int = 1) -> None:
        """Run steps as long as there is work; free rows are erased after each."""
        for _ in range(count):
            if self.has_work:
                self.worker.step()
                self.check()

    def step_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if condition():
                return
            self.step()
        raise AssertionError("the condition does not come true")

    def run(self) -> None:
        """Run until all requests have ended."""
        self.step(MAX_STEPS)
        assert not self.has_work

    def turn(self, request: EngineRequest) -> tuple[str, Finished]:
        """One turn until its end: the whole text and the last event."""
        self.submit(request)
        self.run()
        return self.text(request.request_id), self.finished(request.request_id)

    def last(self, request_id: str) -> Event | None:
        """How the request ended."""
        ends = [event for event in self.events() if is_last(event, request_id)]
        assert len(ends) <= 1, ends
        return ends[0] if ends else None

    def finished(self, request_id: str) -> Finished:
        last = self.last(request_id)
        assert isinstance(last, Finished), last
        return last

    def text(self, request_id: str) -> str:
        own = [event for event in self.events() if event.request_id == request_id]
        return "".join(event.text for event in own if isinstance(event, TextDelta | Finished))

    def events(self) -> list[Event]:
        return [event for event in self.delivered if not isinstance(event, RowReleased)]

    def owners(self) -> dict[str, int]:
        """Rows by the ids of requests and retained states."""
        return dict(self.slots._row)

    def given_up(self) -> list[RowReleased]:
        return [event for event in self.delivered if isinstance(event, RowReleased)]

    def check(self) -> None:
        """Every row has an owner or is erased."""
        self.slots.check()
        free = sorted(set(range(self.pool.num_rows)) - set(self.owners().values()))
        for name, values in self.pool.tensors.items():
            assert is_poison(values[:, free]), (name, free)

    def holds(self, position: Tensor) -> bool:
        """Whether any of these numbers of an earlier state is anywhere in the pool.

        Positions are compared, since they are float64: no two sequences agree in one by chance.
        """
        return any((self.pool.tensors["h"] == value).any() for value in position if value != 0)

    def position(self, owner: str) -> Tensor:
        return self.pool.tensors["h"][0, self.owners()[owner]].clone()


def is_poison(values: Tensor) -> bool:
    wrong = ~values.isnan() if values.is_floating_point() else values != -128
    return not wrong.any()


def asked(name: str, first: int, num_prompt: int, **changes: Any) -> EngineRequest:
    """Prompts that differ from their first token on; positions forget the distant past."""
    prompt = (first, *random.Random(first).choices(range(1, 300), k=num_prompt - 1))
    return request(name, token_ids=prompt, **changes)


def keep_row(stepper: Stepper, state_id: str = "kept", first: int = 9) -> Finished:
    """The end of a turn that left its row under this id."""
    _, last = stepper.turn(asked(f"leaves {state_id}", first, 7, retain_as=state_id))
    assert last.retained_as == state_id
    return last


def check_given_up(delivered: list[Event | RowReleased]) -> None:
    """If no row is retained any more: each reported row was released later, and once."""
    kept, given_up = set[str](), set[str]()
    for event in delivered:
        if isinstance(event, RowReleased):
            assert event.state_id not in given_up
            given_up.add(event.state_id)
        elif isinstance(event, Finished) and event.retained_as is not None:
            assert event.retained_as not in given_up
            kept.add(event.retained_as)
    assert kept <= given_up
