"""Where a turn's state comes from, where it is retained, and what is reported."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.checkpoint import Checkpoint
from model.state import StatePool
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    EngineTimings,
    Failed,
    Finished,
    RowReleased,
    StoredState,
)
from server.engine.rows import Rows
from server.engine.slots import Slots
from tests.server.engine.driver import stored
from tests.server.engine.stepper import (
    SMALL,
    Clock,
    Stepper,
    asked,
    check_given_up,
    is_poison,
    keep_row,
)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes imported into rows, in order."""
    made = list[bytes]()
    works = StatePool.import_row

    def import_row(self: StatePool, row: int, data: bytes) -> None:
        made.append(data)
        works(self, row, data)

    monkeypatch.setattr(StatePool, "import_row", import_row)
    return made


def following(last: Finished, name: str, **changes: Any) -> EngineRequest:
    assert last.continuation is not None
    start = {
        "source": stored(last),
        "continuation": last.continuation,
        "retain_as": f"after {name}",
    }
    made = asked(name, 50, 40, **start)
    return replace(made, **changes)


def outcome(stepper: Stepper, name: str) -> tuple[object, ...]:
    """Everything a turn emits and leaves, except the id of its row."""
    last = stepper.finished(name)
    return stepper.text(name), last.reason, last.num_generated, last.state, last.continuation


def outcome_elsewhere(checkpoint: Checkpoint, each: EngineRequest) -> tuple[object, ...]:
    """The same in an engine that has none of the states."""
    other = Stepper(checkpoint, SMALL)
    other.turn(replace(each, deadline=None))
    return outcome(other, each.request_id)


def busy(stepper: Stepper, max_tokens: int = 20) -> None:
    """Let as many sequences run as allowed."""
    stepper.submit(*(asked(f"runs-{i}", i + 1, 3, max_tokens=max_tokens) for i in range(2)))
    stepper.step()
    assert stepper.slots.num_active == 2


def test_a_retained_row_is_continued_in_place_and_only_that(
    stepper: Stepper, checkpoint: Checkpoint, imported: list[bytes]
) -> None:
    last = keep_row(stepper)
    row = stepper.owners()["kept"]
    there, elsewhere = following(last, "there"), following(last, "elsewhere")
    elsewhere = replace(elsewhere, source=stored(last, "unknown"))
    stepper.submit(there)
    stepper.step()
    assert stepper.owners()["there"] == row
    assert imported == []
    assert stepper.given_up() == [RowReleased("kept", is_evicted=False)]
    stepper.run()
    stepper.turn(elsewhere)
    assert imported == [last.state]
    assert outcome(stepper, "there") == outcome(stepper, "elsewhere")
    assert outcome(stepper, "there") == outcome_elsewhere(checkpoint, there)


def test_a_state_whose_row_is_needed_while_the_turn_waits_is_imported(
    stepper: Stepper, checkpoint: Checkpoint, imported: list[bytes]
) -> None:
    last = keep_row(stepper)
    stepper.submit(asked("ends", 1, 3, max_tokens=2, retain_as="ended"))
    stepper.submit(asked("runs", 2, 3, max_tokens=30), asked("before", 3, 3, max_tokens=30))
    waits = following(last, "waits")
    stepper.submit(waits)
    stepper.step()
    assert stepper.slots.is_retained("kept")
    stepper.step_until(lambda: not stepper.slots.is_retained("kept"))
    assert [s.request.request_id for s in stepper.scheduler.waiting] == ["waits"]
    stepper.run()
    assert imported == [last.state]
    assert stepper.given_up()[0] == RowReleased("kept", is_evicted=True)
    assert outcome(stepper, "waits") == outcome_elsewhere(checkpoint, waits)


def test_a_retained_state_replaces_an_older_one_over_many_turns(
    stepper: Stepper, checkpoint: Checkpoint, imported: list[bytes]
) -> None:
    """A session's turns on one row give the same results as the same turns from bytes."""
    last = other = keep_row(stepper)
    elsewhere = Stepper(checkpoint, SMALL)
    for number in range(4):
        turn = following(last, f"turn-{number}")
        _, last = stepper.turn(turn)
        assert imported == []
        _, other = elsewhere.turn(replace(turn, source=stored(other, "unknown")))
        assert (last.state, last.continuation) == (other.state, other.continuation)
        assert list(stepper.owners()) == [f"after turn-{number}"]
        imported.clear()
    stepper.release(last.retained_as or "")
    stepper.step()
    check_given_up(stepper.delivered)
    assert not any(event.is_evicted for event in stepper.given_up())


@pytest.mark.parametrize("number", [2, 4])
def test_a_state_is_continued_in_place_once(
    stepper: Stepper, checkpoint: Checkpoint, imported: list[bytes], number: int
) -> None:
    """Of several requests with one source, the first gets the row and the others the bytes."""
    last = keep_row(stepper)
    row = stepper.owners()["kept"]
    asking = [
        following(last, f"r{i}", token_ids=(i + 1, 7, 8), max_tokens=5 + i) for i in range(number)
    ]
    stepper.submit(*asking)
    stepper.step()
    assert {name: load == row for name, load in stepper.owners().items()} == {
        "r0": True,
        "r1": False,
    }
    assert imported == [last.state]
    stepper.run()
    assert imported == [last.state] * (number - 1)
    assert stepper.given_up().count(RowReleased("kept", is_evicted=False)) == 1
    for each in asking:
        assert outcome(stepper, each.request_id) == outcome_elsewhere(checkpoint, each)


def test_a_state_is_continued_again_after_the_turn_that_had_its_row_failed(
    stepper: Stepper, checkpoint: Checkpoint, imported: list[bytes]
) -> None:
    last = keep_row(stepper)
    stepper.submit(following(last, "cancelled"))
    stepper.step()
    stepper.cancel("cancelled")
    again = following(last, "again")
    stepper.turn(again)
    assert imported == [last.state]
    assert outcome(stepper, "again") == outcome_elsewhere(checkpoint, again)


@pytest.mark.parametrize("end", ["cancelled", "late", "wrong token", "wrong continuation"])
def test_a_turn_that_ends_while_it_waits_leaves_the_retained_row(
    stepper: Stepper, clock: Clock, checkpoint: Checkpoint, imported: list[bytes], end: str
) -> None:
    last = keep_row(stepper)
    row, former = stepper.owners()["kept"], stepper.position("kept")
    busy(stepper)
    ended = following(last, "ended")
    if end == "late":
        ended = replace(ended, deadline=clock.now + 1)
    elif end == "wrong token":
        ended = replace(ended, token_ids=(300,))
    elif end == "wrong continuation":
        ended = replace(ended, continuation=Continuation(recent=b"123"))
    stepper.submit(ended)
    stepper.step()
    waiting = [s.request.request_id for s in stepper.scheduler.waiting]
    assert waiting == (["ended"] if end in ("cancelled", "late") else [])
    if end == "cancelled":
        stepper.cancel("ended")
    clock.now += 2
    stepper.step()
    assert not stepper.scheduler.waiting
    assert stepper.owners()["kept"] == row
    assert stepper.position("kept").equal(former)
    stepper.run()
    expected = {"cancelled": type(None), "late": DeadlinePassed}.get(end, Failed)
    assert type(stepper.last("ended")) is expected
    assert stepper.owners() == {"kept": row}
    assert stepper.given_up() == []
    after = following(last, "next")
    stepper.turn(after)
    assert imported == []
    assert outcome(stepper, "next") == outcome_elsewhere(checkpoint, after)


def adopt(stepper: Stepper, last: Finished) -> None:
    stepper.turn(following(last, "adopts", retain_as=None))


def adopt_and_cancel(stepper: Stepper, last: Finished) -> None:
    stepper.submit(following(last, "adopts"))
    stepper.step()
    stepper.cancel("adopts")


def adopt_and_fail(stepper: Stepper, last: Finished) -> None:
    stepper.submit(following(last, "fails", token_ids=(), continuation=Continuation()))
    stepper.run()
    assert isinstance(stepper.last("fails"), Failed)


def release(stepper: Stepper, last: Finished) -> None:
    for _ in range(2):
        stepper.release(last.retained_as or "")
    stepper.turn(asked("beside", 1, 3))


def evict(stepper: Stepper, last: Finished) -> None:
    del last
    for i in range(SMALL.max_running + SMALL.warm_sessions):
        stepper.turn(asked(f"r{i}", i + 1, 3, retain_as=f"s{i}"))


def lose(stepper: Stepper, last: Finished) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    del last
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StatePool, "reset", broken)
        stepper.submit(asked("fails", 1, 3))
        stepper.run()
    assert isinstance(stepper.last("fails"), Failed)


@pytest.mark.parametrize(
    ("end", "is_evicted"),
    [
        (adopt, False),
        (adopt_and_cancel, False),
        (adopt_and_fail, False),
        (release, False),
        (evict, True),
        (lose, True),
    ],
)
def test_a_retained_row_is_evicted_once_and_after_it_was_reported(
    stepper: Stepper, end: Callable[[Stepper, Finished], None], is_evicted: bool
) -> None:
    last = keep_row(stepper)
    assert stepper.given_up() == []
    end(stepper, last)
    stepper.run()
    given_up = [event for event in stepper.given_up() if event.state_id == "kept"]
    assert given_up == [RowReleased("kept", is_evicted)]
    for name in stepper.owners():
        stepper.release(name)
    stepper.run()
    check_given_up(stepper.delivered)
    assert all(map(is_poison, stepper.pool.tensors.values()))


@pytest.mark.parametrize("end", ["released", "evicted", "lost"])
def test_a_row_that_is_given_up_before_its_state_has_come_is_not_reported_later(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    stepper.submit(asked("ends", 1, 3, max_tokens=1, retain_as="kept"))
    stepper.submit(asked("runs", 2, 3, max_tokens=50))
    stepper.step_until(lambda: stepper.slots.is_retained("kept"))
    if end == "released":
        stepper.release("kept")
    elif end == "evicted":
        stepper.submit(
            *(asked(f"r{i}", i + 3, 1, max_tokens=1, retain_as=f"s{i}") for i in range(3))
        )
    else:
        with monkeypatch.context() as patched:
            patched.setattr(StatePool, "reset", lambda *_: 1 / 0)
            stepper.submit(asked("fails", 3, 1))
            stepper.step()
    stepper.run()
    given_up = [event for event in stepper.given_up() if event.state_id == "kept"]
    assert given_up == [RowReleased("kept", is_evicted=end != "released")]
    for name in stepper.owners():
        stepper.release(name)
    stepper.run()
    check_given_up(stepper.delivered)


def test_without_rows_no_state_is_retained(checkpoint: Checkpoint, clock: Clock) -> None:
    del clock
    stepper = Stepper(checkpoint, replace(SMALL, warm_sessions=0))
    _, last = stepper.turn(asked("ends", 1, 3, retain_as="state"))
    assert last.retained_as is None
    assert stepper.given_up() == []
    assert stepper.owners() == {}
    after = following(last, "next")
    stepper.turn(after)
    assert outcome(stepper, "next") == outcome_elsewhere(checkpoint, after)


def test_a_released_state_is_erased(stepper: Stepper) -> None:
    keep_row(stepper)
    assert stepper.holds(stepper.position("kept"))
    stepper.release("kept")
    stepper.release("unknown")
    stepper.step()
    assert all(map(is_poison, stepper.pool.tensors.values()))


@pytest.mark.parametrize("source", [None, StoredState("short", b"too short"), "stored"])
def test_the_new_owner_of_an_evicted_row_sees_nothing_of_it(
    checkpoint: Checkpoint, stepper: Stepper, source: StoredState | str | None
) -> None:
    if isinstance(source, str):
        source = stored(keep_row(Stepper(checkpoint, SMALL), "other", first=77))
    new = asked("new", 60, 5, source=source, retain_as="after new")
    expected = Stepper(checkpoint, SMALL)
    expected.submit(new)
    expected.run()

    for i in range(3):
        keep_row(stepper, f"kept-{i}", first=10 + i)
    assert stepper.slots.num_free == 0
    oldest = stepper.position("kept-0")
    stepper.submit(new)
    stepper.step()
    assert RowReleased("kept-0", is_evicted=True) in stepper.delivered
    assert not stepper.holds(oldest)
    stepper.run()
    assert type(stepper.last("new")) is type(expected.last("new"))
    if isinstance(stepper.last("new"), Finished):
        assert outcome(stepper, "new") == outcome(expected, "new")


def ended(name: str, retain_as: str) -> Finished:
    return Finished(name, "", "stop", 1, EngineTimings(0.0, 0.0, 0.0, 0.0), retained_as=retain_as)


def test_states_arrive_in_the_order_of_their_turns_and_as_they_were(
    checkpoint: Checkpoint, decoder: str
) -> None:
    slots = Slots(4)
    rows = Rows(checkpoint.network, slots, 1)
    chance, states = random.Random(1), list[bytes]()
    for name in "abc":
        blank = rows.pool.export_row(0)
        states.append(bytes(chance.randrange(256) for _ in blank))
        rows.load(asked(name, 1, 3, source=StoredState("unknown", states[-1])))
        rows.start_export(ended(name, f"state {name}"), f"state {name}")
    rows.release("state b")
    early = list(rows.finished_exports(wait=False))
    assert len(early) == (0 if decoder == "ahead" else 3)
    finished_exports = [*early, *rows.finished_exports(wait=True)]
    assert [finished.request_id for finished in finished_exports] == ["a", "b", "c"]
    assert [finished.state for finished in finished_exports] == states
    assert [finished.retained_as for finished in finished_exports] == ["state a", None, "state c"]
    rows.reset_all()
    assert slots.num_free == 4
    assert list(rows.finished_exports(wait=True)) == []
    assert all(map(is_poison, rows.pool.tensors.values()))
