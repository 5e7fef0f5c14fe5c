"""What remains of a turn at its end, and what else ends with it: the worker step by step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch
from model.checkpoint import Checkpoint
from model.decoding.sampling import RecentTokens, SamplingParams
from model.state import StatePool
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    Failed,
    Finished,
    RowReleased,
)
from tests.server.engine.driver import stored
from tests.server.engine.stepper import (
    MAX_STEPS,
    SMALL,
    Clock,
    Stepper,
    asked,
    check_given_up,
    is_poison,
    keep_row,
)


@pytest.mark.parametrize("end", ["cancel", "deadline"])
@pytest.mark.parametrize("phase", ["reading", "reading a kept one", "decoding"])
def test_a_turn_that_is_ended_leaves_nothing_of_its_state(
    stepper: Stepper, clock: Clock, phase: str, end: str
) -> None:
    late = clock.now + 1 if end == "deadline" else None
    beside = asked("beside", 3, 20)
    expected = stepper.turn(replace(beside, request_id="alone"))[0]
    ended = asked("ended", 4, 5 if phase == "decoding" else 500, max_tokens=500, deadline=late)
    if phase == "reading a kept one":
        ended = replace(ended, source=stored(keep_row(stepper)))
    stepper.submit(beside, ended)
    stepper.step(4)
    sequence = stepper.scheduler.find("ended")
    phases = {"decoding": [*stepper.scheduler.decoding.values()]}
    assert sequence in phases.get(phase, stepper.scheduler.prefilling)
    former = stepper.position("ended")
    assert stepper.holds(former)
    if end == "cancel":
        stepper.cancel("ended")
    clock.now += 2
    stepper.step()
    assert not stepper.holds(former)
    stepper.run()
    assert stepper.last("ended") == (DeadlinePassed("ended") if late else None)
    assert stepper.text("beside") == expected
    assert stepper.owners() == {}


def test_requests_cancelled_at_once_end_before_the_next_step(
    checkpoint: Checkpoint, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every phase: 4 decode, 4 read, 192 wait."""
    del clock
    stepper = Stepper(checkpoint, replace(SMALL, max_running=8, max_waiting=256))
    first = [asked(f"r{i}", i + 1, 5, max_tokens=500) for i in range(4)]
    stepper.submit(*first)
    stepper.step(3)
    others = [asked(f"r{i}", i % 250 + 1, 500, max_tokens=500) for i in range(4, 200)]
    stepper.submit(*others)
    stepper.step()
    phases = (stepper.scheduler.decoding, stepper.scheduler.prefilling, stepper.scheduler.waiting)
    assert [len(phase) for phase in phases] == [4, 4, 192]
    for each in [*others, *first]:
        stepper.cancel(each.request_id)
    stepper.submit(asked("after", 77, 1, max_tokens=2))
    read, forward = list[int](), checkpoint.network.forward

    def watched(batch: Batch, pool: StatePool) -> Tensor:
        read.append(len(batch.rows))
        return forward(batch, pool)

    monkeypatch.setattr(checkpoint.network, "forward", watched)
    before = len(stepper.delivered)
    stepper.step()
    assert read == [1]
    assert list(stepper.owners()) == ["after"]
    stepper.run()
    assert {event.request_id for event in stepper.events()[before:]} == {"after"}
    assert not stepper.inbox._num_waiting
    assert not stepper.inbox._num_tokens
    stepper.run()
    assert all(map(is_poison, stepper.pool.tensors.values()))


def test_a_turn_that_keeps_nothing_leaves_nothing(stepper: Stepper) -> None:
    for number, max_tokens in enumerate((0, 1, 12)):
        stepper.turn(asked(f"r{number}", 5, 40, max_tokens=max_tokens))
        assert all(map(is_poison, stepper.pool.tensors.values()))


def broken(*_: object) -> None:
    raise RuntimeError("no memory")


def test_after_an_error_in_a_step_no_state_is_left(
    stepper: Stepper, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a retained one: an error during transfers may leave it under another's id."""
    keep_row(stepper)
    expected, _ = stepper.turn(asked("alone", 7, 20))
    stepper.submit(asked("decodes", 5, 2, max_tokens=100), asked("reads", 6, 300))
    stepper.step(2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.network, "forward", broken)
        stepper.step()
    assert isinstance(stepper.last("decodes"), Failed)
    assert isinstance(stepper.last("reads"), Failed)
    assert stepper.given_up() == [RowReleased("kept", is_evicted=True)]
    assert all(map(is_poison, stepper.pool.tensors.values()))
    assert stepper.turn(asked("again", 7, 20))[0] == expected


def run_unchecked(stepper: Stepper) -> None:
    """`Stepper.run`, whatever free rows hold."""
    while stepper.has_work:
        stepper.worker.step()


def test_the_engine_continues_if_nothing_can_be_erased(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked("one", 7, 20)
    expected, _ = stepper.turn(replace(one, request_id="alone"))
    with monkeypatch.context() as patched:
        patched.setattr(StatePool, "poison", broken)
        stepper.submit(asked("ends", 5, 1, max_tokens=1))
        run_unchecked(stepper)
    assert isinstance(stepper.last("ends"), Failed)
    stepper.submit(one)
    run_unchecked(stepper)
    assert stepper.text("one") == expected


def recent(token_id: int) -> bytes:
    made = RecentTokens()
    made.append(token_id, generated=True)
    return made.to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"continuation": Continuation(position=1, pending=(300,))},
        {"continuation": Continuation(position=1, pending=(-1,))},
        {"continuation": Continuation(position=1, pending=(10**30,))},
        {"continuation": Continuation(recent=recent(300))},
        {"token_ids": (1, 300)},
        {"token_ids": (1, 10**30)},
        {"sampling": SamplingParams(logit_bias=((300, 1.0),))},
    ],
)
def test_a_token_that_the_model_does_not_have_fails_alone(
    stepper: Stepper, changes: dict[str, Any]
) -> None:
    other = asked("beside", 2, 30)
    expected, _ = stepper.turn(replace(other, request_id="alone"))
    penalised = SamplingParams(presence_penalty=1.0)
    bad = replace(asked("bad", 9, 3, sampling=penalised), **changes)
    last_ones = Continuation(position=1, pending=(299,), recent=recent(299))
    good = asked("good", 9, 3, sampling=penalised, continuation=last_ones)
    stepper.submit(other, bad, good)
    stepper.run()
    assert isinstance(stepper.last("bad"), Failed)
    assert stepper.text("beside") == expected
    assert isinstance(stepper.last("good"), Finished)


TURNS = st.fixed_dictionaries(
    {
        "num_prompt": st.sampled_from([1, 2, 17, 70, 200]),
        "max_tokens": st.sampled_from([0, 1, 2, 9]),
        "keeps": st.booleans(),
        "stop": st.sampled_from([(), ("a", "\n"), ("e",)]),
        "begins": st.sampled_from(["fresh", "kept", "released", "again"]),
        "late": st.sampled_from([None, None, 0, 1, 4, 9]),
    }
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), TURNS),
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("release"), st.integers(0, 9)),
    ),
    min_size=4,
    max_size=40,
)
ALONE: dict[EngineRequest, tuple[object, ...]] = {}
"""Turns without concurrent ones."""


class Play:
    """Random turns in one worker, and what must be erased after each step."""

    def __init__(self, checkpoint: Checkpoint, clock: Clock) -> None:
        self.stepper = Stepper(checkpoint, SMALL)
        self.clock = clock
        self.requests = list[EngineRequest]()
        self.cancelled = set[str]()
        self.continued = set[str]()
        self.known = list[Tensor]()
        """Positions of states with which turns start."""

        self.gone = list[Tensor]()
        """Positions of states that must not be visible any more."""

    def ends(self) -> list[Finished]:
        """Turns that left a state."""
        ends = [event for event in self.stepper.events() if isinstance(event, Finished)]
        return [end for end in ends if end.state is not None]

    def submit(self, turn: dict[str, Any]) -> None:
        turn = dict(turn)
        begins, late, num_prompt = turn.pop("begins"), turn.pop("late"), turn.pop("num_prompt")
        number = len(self.requests)
        retain_as = f"state-{number}" if turn.pop("keeps") else None
        deadline = None if late is None else self.clock.now + late
        made = asked(
            f"r{number}", number + 1, num_prompt, deadline=deadline, retain_as=retain_as, **turn
        )
        ends = self.ends()
        if begins != "again":
            ends = [end for end in ends if end.request_id not in self.continued]
        if begins != "fresh" and ends:
            parent = ends[0]
            self.continued.add(parent.request_id)
            if begins == "released":
                self.stepper.release(parent.retained_as or "")
            continuation = parent.continuation or Continuation()
            made = replace(made, source=stored(parent), continuation=continuation)
            self.known.append(self.position(parent))
        self.requests.append(made)
        self.stepper.submit(made)

    def position(self, end: Finished) -> Tensor:
        """As `Stepper.position`, of a turn's state."""
        pool = self.stepper.worker._network.new_pool(1)
        pool.import_row(0, end.state or b"")
        return pool.tensors["h"][0, 0].clone()

    def cancel(self, number: int) -> None:
        if self.requests:
            name = self.requests[-1 - number % len(self.requests)].request_id
            self.cancelled.add(name)
            self.stepper.cancel(name)

    def release(self, number: int) -> None:
        if ends := self.ends():
            self.stepper.release(ends[number % len(ends)].retained_as or "")

    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.stepper.has_work:
                break
            before = {name: self.stepper.position(name) for name in self.stepper.owners()}
            running = {r.request_id for r in self.requests if not self.has_ended(r)}
            self.clock.now += 1
            self.stepper.step()
            for each in self.requests:
                name = each.request_id
                is_late = isinstance(self.stepper.last(name), DeadlinePassed)
                if name in running and name in before and (is_late or name in self.cancelled):
                    former = before[name]
                    if not any(torch.equal(former, known) for known in self.known):
                        self.gone.append(former)
            assert not any(map(self.stepper.holds, self.gone))

    def has_ended(self, each: EngineRequest) -> bool:
        return self.stepper.last(each.request_id) is not None


def alone(checkpoint: Checkpoint, each: EngineRequest) -> object:
    """What a turn emits and leaves when it runs alone."""
    retain_as = each.retain_as and "state"
    each = replace(each, request_id="alone", retain_as=retain_as, deadline=None)
    if each not in ALONE:
        text, last = Stepper(checkpoint, SMALL).turn(each)
        ALONE[each] = (text, last.reason, last.state, last.continuation)
    return ALONE[each]


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS)
def test_whatever_ends_when_no_row_is_lost_and_no_state_is_left(
    checkpoint: Checkpoint, clock: Clock, actions: list[tuple[str, Any]]
) -> None:
    play = Play(checkpoint, clock)
    stepper = play.stepper
    for action, argument in actions:
        getattr(play, action)(argument)
    play.step(MAX_STEPS)
    assert not stepper.has_work
    for each in play.requests:
        name = each.request_id
        match stepper.last(name):
            case Finished(reason=reason, state=state, continuation=continuation):
                outcome = (stepper.text(name), reason, state, continuation)
                assert outcome == alone(checkpoint, each)
            case DeadlinePassed():
                assert each.deadline is not None
            case end:
                assert end is None
                assert name in play.cancelled
    assert stepper.slots.num_active == 0
    assert stepper.slots.num_free + stepper.slots.num_retained == stepper.slots.num_rows
    assert not stepper.inbox._num_waiting
    assert not stepper.inbox._num_tokens
    for name in stepper.owners():
        stepper.release(name)
    stepper.step()
    assert all(map(is_poison, stepper.pool.tensors.values()))
    check_given_up(stepper.delivered)
