"""An engine with its events collected, for tests on a tiny real network."""

import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from model.checkpoint import Checkpoint
from model.decoding.sampling import SamplingParams
from server.engine.engine import Engine, EngineLimits
from server.engine.messages import (
    Continuation,
    EngineRequest,
    Event,
    Finished,
    PromptScored,
    RowReleased,
    StoredState,
    TextDelta,
)
from server.metrics import Metrics
from tests.patience import PATIENCE_S

LIMITS = EngineLimits(
    max_running=4,
    warm_sessions=2,
    max_waiting=64,
    max_waiting_tokens=100_000,
    prefill_chunk_tokens=128,
    inter_token_latency_s=0.1,
    prefix_cache_bytes=0,
)


class Driver:
    """An engine and the events it delivered."""

    def __init__(self, checkpoint: Checkpoint, limits: EngineLimits = LIMITS) -> None:
        self.events: queue.Queue[list[Event | RowReleased]] = queue.Queue()
        self.metrics = Metrics()
        self.engine = Engine(checkpoint, limits, self.deliver, self.metrics)
        self.engine.start()
        self.seen: list[Event] = []
        self.given_up: list[RowReleased] = []

    def deliver(self, events: list[Event | RowReleased]) -> None:
        self.events.put(events)

    def wait(self, condition: Callable[[list[Event]], bool]) -> list[Event]:
        """Collect events until the condition holds on all of them."""
        while not condition(self.seen):
            for event in self.events.get(timeout=PATIENCE_S):
                if isinstance(event, RowReleased):
                    self.given_up.append(event)
                else:
                    self.seen.append(event)
        return self.seen

    def turn(self, request: EngineRequest) -> tuple[str, Finished]:
        """Submit and wait for the end: the whole text and the last event."""
        self.engine.submit(request)
        return self.result(request.request_id)

    def result(self, request_id: str) -> tuple[str, Finished]:
        events = self.wait(lambda seen: any(is_last(e, request_id) for e in seen))
        own = [e for e in events if e.request_id == request_id]
        last = own[-1]
        assert isinstance(last, Finished), last
        return "".join(e.text for e in own if isinstance(e, TextDelta | Finished)), last

    def value(self, name: str) -> float:
        """A metric without labels."""
        return self.metrics.registry.get_sample_value(f"latentd_{name}") or 0.0

    def slots(self) -> dict[str, float]:
        names = ("free", "running", "warm")
        values = {
            n: self.metrics.registry.get_sample_value("latentd_slots", {"state": n}) for n in names
        }
        return {name: value or 0.0 for name, value in values.items()}


def is_last(event: Event, request_id: str) -> bool:
    return event.request_id == request_id and not isinstance(event, TextDelta | PromptScored)


def request(name: str, num_prompt: int = 7, **changes: Any) -> EngineRequest:
    prompt = tuple((i * 37 + len(name)) % 299 + 1 for i in range(num_prompt))
    base = EngineRequest(
        name, None, Continuation(), prompt, 12, SamplingParams(seed=5), ignore_eos=True
    )
    return replace(base, **changes)


def stored(last: Finished, state_id: str | None = None) -> StoredState:
    """The state after a turn. With a new id it is in no row."""
    assert last.state is not None
    return StoredState(last.retained_as or "" if state_id is None else state_id, last.state)


def following(last: Finished, name: str, num_prompt: int = 7, **changes: Any) -> EngineRequest:
    """The next turn, from the row where the state was retained unless `source` says otherwise."""
    assert last.continuation is not None
    start = {"source": stored(last), "continuation": last.continuation}
    return request(name, num_prompt, **(start | changes))
