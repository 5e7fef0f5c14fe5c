"""What is left of a turn when it ends, and whom it takes with it: the worker step by step."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoint import Checkpoint
from model.sampling import RecentTokens, SamplingParams
from model.state import StatePool
from server.engine import worker
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    Failed,
    Finished,
    Fresh,
    NoProbabilities,
    Parked,
    RowGivenUp,
    StateMissing,
    Warm,
)
from tests.server.engine.driver import LIMITS, request
from tests.server.engine.stepper import MOST_STEPS, Clock, Stepper, is_poison

SMALL = replace(
    LIMITS,
    max_running=2,
    warm_sessions=1,
    prefill_chunk_tokens=32,
    prefill_tokens_while_decoding=16,
)


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    made = Clock()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "time", made)
        yield made


@pytest.fixture
def stepper(checkpoint: Checkpoint, clock: Clock) -> Stepper:
    del clock
    return Stepper(checkpoint, SMALL)


def asked(name: str, first: int, num_prompt: int, **changes: Any) -> EngineRequest:
    """Prompts that differ from their first token on; positions forget what was long ago."""
    prompt = (first, *random.Random(first).choices(range(1, 300), k=num_prompt - 1))
    return request(name, token_ids=prompt, **changes)


def kept(stepper: Stepper, name: str = "kept", first: int = 9) -> Finished:
    """A turn that left its row warm."""
    _, last = stepper.turn(asked(name, first, 7, keep_state=True))
    assert last.warm is not None
    return last


def following(last: Finished, name: str, **changes: Any) -> EngineRequest:
    assert last.continuation is not None
    source = Warm(last.warm or "")
    return asked(name, 50, 40, source=source, continuation=last.continuation, **changes)


@pytest.mark.parametrize("end", ["cancel", "deadline"])
@pytest.mark.parametrize("phase", ["reading", "reading a warm one", "decoding"])
def test_a_turn_that_is_ended_leaves_nothing_of_its_state(
    stepper: Stepper, clock: Clock, phase: str, end: str
) -> None:
    late = clock.now + 1 if end == "deadline" else None
    beside = asked("beside", 3, 20)
    expected = stepper.turn(replace(beside, request_id="alone"))[0]
    ended = asked("ended", 4, 5 if phase == "decoding" else 500, max_tokens=500, deadline=late)
    if phase == "reading a warm one":
        last = kept(stepper)
        ended = replace(ended, source=Warm(last.warm or ""))
    stepper.submit(beside, ended)
    stepper.step(4)
    sequence = stepper.scheduler.find("ended")
    phases = {"decoding": [*stepper.scheduler.decoding.values()]}
    assert sequence in phases.get(phase, stepper.scheduler.reading)
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


def test_all_that_is_cancelled_at_once_is_gone_before_the_next_step(
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
    phases = (stepper.scheduler.decoding, stepper.scheduler.reading, stepper.scheduler.waiting)
    assert [len(phase) for phase in phases] == [4, 4, 192]
    for each in [*others, *first]:
        stepper.cancel(each.request_id)
    stepper.submit(asked("after", 77, 1, max_tokens=2))
    decoded, step = list[int](), checkpoint.network.step

    def watched(ids: Tensor, pool: StatePool, rows: list[int]) -> Tensor:
        decoded.append(len(rows))
        return step(ids, pool, rows)

    monkeypatch.setattr(checkpoint.network, "step", watched)
    before = len(stepper.delivered)
    stepper.step()
    assert decoded == [1]
    assert list(stepper.owners()) == ["after"]
    assert {event.request_id for event in stepper.events()[before:]} == {"after"}
    assert stepper.inbox._num_waiting == stepper.inbox._num_tokens == 0
    stepper.run()
    assert all(map(is_poison, stepper.pool.tensors.values()))


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_turn_that_ends_while_it_waits_leaves_nothing_of_its_warm_state(
    stepper: Stepper, clock: Clock, end: str
) -> None:
    last = kept(stepper)
    former = stepper.position(last.warm or "")
    stepper.submit(*(asked(f"runs-{i}", i + 1, 3, max_tokens=20) for i in range(2)))
    stepper.step()
    late = clock.now + 1 if end == "deadline" else None
    stepper.submit(following(last, "ended", deadline=late))
    stepper.step()
    assert [s.request.request_id for s in stepper.scheduler.waiting] == ["ended"]
    assert stepper.holds(former)
    if end == "cancel":
        stepper.cancel("ended")
    clock.now += 2
    stepper.step()
    assert not stepper.holds(former)
    stepper.run()
    assert stepper.owners() == {}


def test_a_turn_that_keeps_nothing_leaves_nothing(stepper: Stepper) -> None:
    for number, max_tokens in enumerate((0, 1, 12)):
        stepper.turn(asked(f"r{number}", 5, 40, max_tokens=max_tokens))
        assert all(map(is_poison, stepper.pool.tensors.values()))


def test_a_released_warm_state_is_erased(stepper: Stepper) -> None:
    last = kept(stepper)
    assert stepper.holds(stepper.position(last.warm or ""))
    stepper.release(last.warm or "")
    stepper.release("unknown")
    stepper.step()
    assert all(map(is_poison, stepper.pool.tensors.values()))


@pytest.mark.parametrize("source", [Fresh(), Parked(b"too short"), "parked"])
def test_who_gets_the_row_of_an_evicted_state_sees_nothing_of_it(
    checkpoint: Checkpoint, stepper: Stepper, source: Fresh | Parked | str
) -> None:
    parked = kept(Stepper(checkpoint, SMALL), "other", first=77)
    if isinstance(source, str):
        assert parked.state is not None
        source = Parked(parked.state)
    new = asked("new", 60, 5, source=source, keep_state=True)
    expected = Stepper(checkpoint, SMALL)
    expected.submit(new)
    expected.run()

    warm = [kept(stepper, f"kept-{i}", first=10 + i) for i in range(3)]
    assert stepper.slots.num_free == 0
    oldest = stepper.position(warm[0].warm or "")
    stepper.submit(new)
    stepper.step()
    assert RowGivenUp(warm[0].warm or "") in stepper.delivered
    assert not stepper.holds(oldest)
    stepper.run()
    assert type(stepper.last("new")) is type(expected.last("new"))
    if isinstance(stepper.last("new"), Finished):
        assert stepper.text("new") == expected.text("new")
        assert stepper.finished("new").state == expected.finished("new").state


def broken(*_: object) -> None:
    raise RuntimeError("no memory")


def test_after_an_error_in_a_step_no_state_is_left(
    stepper: Stepper, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a warm one: an error while rows are exchanged may leave it under another's name."""
    last = kept(stepper)
    expected, _ = stepper.turn(asked("alone", 7, 20))
    stepper.submit(asked("decodes", 5, 2, max_tokens=100), asked("reads", 6, 300))
    stepper.step(2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.network, "step", broken)
        stepper.step()
    assert isinstance(stepper.last("decodes"), Failed)
    assert isinstance(stepper.last("reads"), Failed)
    assert RowGivenUp(last.warm or "") in stepper.delivered
    assert all(map(is_poison, stepper.pool.tensors.values()))
    assert stepper.turn(asked("again", 7, 20))[0] == expected


def test_the_engine_goes_on_where_nothing_can_be_erased(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked("one", 7, 20)
    expected, _ = stepper.turn(replace(one, request_id="alone"))
    with monkeypatch.context() as patched:
        patched.setattr(StatePool, "poison", broken)
        stepper.submit(asked("ends", 5, 1, max_tokens=1))
        stepper.worker.step()
    assert isinstance(stepper.last("ends"), Failed)
    stepper.submit(one)
    while stepper.has_work:
        stepper.worker.step()
    assert stepper.text("one") == expected


WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(seed=3),
    "filtered": SamplingParams(seed=3, top_k=20),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_state_fails_alone(
    checkpoint: Checkpoint, clock: Clock, way: str, value: float
) -> None:
    del clock
    stepper = Stepper(checkpoint)
    others = [asked(f"beside-{i}", i + 1, 10 + 30 * i, sampling=WAYS[way]) for i in range(3)]
    expected = [
        stepper.turn(replace(each, request_id=f"alone-{each.request_id}"))[0] for each in others
    ]
    damaged = stepper.worker._network.new_pool(1)
    damaged.tensors["h"][0, 0, 5] = value
    source = Parked(damaged.export_row(0))
    bad = asked("bad", 9, 5, source=source, sampling=WAYS[way], keep_state=True)
    stepper.submit(others[0], bad, *others[1:])
    stepper.run()
    assert stepper.last("bad") == NoProbabilities("bad")
    assert stepper.text("bad") == ""
    assert [stepper.text(each.request_id) for each in others] == expected
    assert stepper.owners() == {}


def test_a_state_that_is_damaged_on_the_way_fails_alone(stepper: Stepper) -> None:
    other = asked("beside", 2, 30, max_tokens=40)
    expected, _ = stepper.turn(replace(other, request_id="alone"))
    stepper.submit(asked("bad", 9, 3, max_tokens=40, keep_state=True), other)
    stepper.step(10)
    said = stepper.text("bad")
    stepper.pool.tensors["h"][0, stepper.owners()["bad"]] = torch.nan
    stepper.run()
    assert stepper.last("bad") == NoProbabilities("bad")
    assert stepper.text("bad") == said
    assert stepper.text("beside") == expected
    assert stepper.owners() == {}


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


@pytest.mark.parametrize("method", ["push_only_text", "cut", "append"])
def test_an_error_in_one_text_ends_no_other(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    other = asked("beside", 2, 30)
    expected, _ = stepper.turn(replace(other, request_id="alone"))
    bad = asked("bad", 9, 3, keep_state=True)
    whole, _ = stepper.turn(replace(bad, request_id="whole", keep_state=False))
    if method == "cut":
        bad = replace(bad, stop=(whole[2:4],))
    works = getattr(Sequence, method)

    def fail(self: Sequence, *arguments: object) -> object:
        if self.request.request_id == "bad":
            raise OSError("a secret")
        return works(self, *arguments)

    monkeypatch.setattr(Sequence, method, fail)
    stepper.submit(bad, other)
    stepper.run()
    assert stepper.last("bad") == Failed("bad", worker.FAILED)
    assert stepper.text("beside") == expected
    assert stepper.owners() == {}


TURNS = st.fixed_dictionaries(
    {
        "num_prompt": st.sampled_from([1, 2, 17, 70, 200]),
        "max_tokens": st.sampled_from([0, 1, 2, 9]),
        "keep_state": st.booleans(),
        "stop": st.sampled_from([(), ("a", "\n"), ("e",)]),
        "begins": st.sampled_from(["fresh", "warm", "parked"]),
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
"""Turns that nothing ran beside."""


class Play:
    """Random turns in one worker, and what has to be gone after each step."""

    def __init__(self, checkpoint: Checkpoint, clock: Clock) -> None:
        self.stepper = Stepper(checkpoint, SMALL)
        self.clock = clock
        self.requests = list[EngineRequest]()
        self.cancelled = set[str]()
        self.parents: dict[str, Finished] = {}
        self.continued = set[str]()
        self.gone = list[Tensor]()
        """Positions of states that no one may see any more."""

    def kept(self) -> list[Finished]:
        """Turns that left a state with which no turn has begun."""
        ends = [event for event in self.stepper.events() if isinstance(event, Finished)]
        return [e for e in ends if e.state is not None and e.request_id not in self.continued]

    def submit(self, turn: dict[str, Any]) -> None:
        turn = dict(turn)
        begins, late, num_prompt = turn.pop("begins"), turn.pop("late"), turn.pop("num_prompt")
        number = len(self.requests)
        deadline = None if late is None else self.clock.now + late
        made = asked(f"r{number}", number + 1, num_prompt, deadline=deadline, **turn)
        if begins != "fresh" and (kept := self.kept()):
            parent = kept[0]
            self.continued.add(parent.request_id)
            self.parents[made.request_id] = parent
            made = replace(made, continuation=parent.continuation or Continuation())
            if begins == "warm":
                made = replace(made, source=Warm(parent.warm or ""))
            else:
                self.stepper.release(parent.warm or "")
                made = replace(made, source=Parked(parent.state or b""))
        self.requests.append(made)
        self.stepper.submit(made)

    def cancel(self, number: int) -> None:
        if self.requests:
            name = self.requests[-1 - number % len(self.requests)].request_id
            self.cancelled.add(name)
            self.stepper.cancel(name)

    def release(self, number: int) -> None:
        if kept := self.kept():
            self.stepper.release(kept[number % len(kept)].warm or "")

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
                if name in running and (is_late or name in self.cancelled):
                    source = each.source.name if isinstance(each.source, Warm) else name
                    if (former := before.get(name, before.get(source))) is not None:
                        self.gone.append(former)
            assert not any(map(self.stepper.holds, self.gone))

    def has_ended(self, each: EngineRequest) -> bool:
        return self.stepper.last(each.request_id) is not None


def alone(checkpoint: Checkpoint, each: EngineRequest, parent: Finished | None) -> object:
    """What a turn says and leaves when nothing runs beside it."""
    source = each.source if parent is None else Parked(parent.state or b"")
    each = replace(each, request_id="alone", source=source, deadline=None)
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
    play.step(MOST_STEPS)
    assert not stepper.has_work
    for each in play.requests:
        name = each.request_id
        match stepper.last(name):
            case Finished(reason=reason, state=state, continuation=continuation):
                told = (stepper.text(name), reason, state, continuation)
                assert told == alone(checkpoint, each, play.parents.get(name))
            case DeadlinePassed():
                assert each.deadline is not None
            case StateMissing():
                assert isinstance(each.source, Warm)
            case end:
                assert end is None
                assert name in play.cancelled
    assert stepper.slots.num_active == 0
    assert stepper.slots.num_free + stepper.slots.num_warm == stepper.slots.num_rows
    assert stepper.inbox._num_waiting == stepper.inbox._num_tokens == 0
    for name in stepper.owners():
        stepper.release(name)
    stepper.step()
    assert all(map(is_poison, stepper.pool.tensors.values()))
