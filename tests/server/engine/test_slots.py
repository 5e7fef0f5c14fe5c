"""Rows stay with their one owner; kept states give way to new sequences, which is reported."""

import random

import pytest

from server.engine.messages import RowGivenUp
from server.engine.slots import Slots


def slots_with_kept(num_rows: int, *state_ids: str) -> Slots:
    slots = Slots(num_rows)
    for state_id in state_ids:
        slots.acquire(f"leaves {state_id}")
        slots.keep(f"leaves {state_id}", state_id)
    return slots


def test_kept_rows_are_given_up_oldest_first() -> None:
    slots = slots_with_kept(2, "a", "b")
    slots.acquire("c")
    assert not slots.is_kept("a")
    assert slots.is_kept("b")
    assert slots.adopt("b", "d")
    assert not slots.adopt("b", "e")
    assert not slots.can_acquire()


def test_a_row_is_given_up_once_however_it_ends() -> None:
    slots = slots_with_kept(4, "adopted", "released", "evicted", "lost")
    assert slots.drain_given_up() == []
    slots.adopt("adopted", "a")
    assert not slots.adopt("adopted", "b")
    slots.release("a")
    slots.release("released")
    for name in ("c", "d", "e"):
        slots.acquire(name)
    slots.release_all()
    assert slots.drain_given_up() == [
        RowGivenUp("adopted", is_evicted=False),
        RowGivenUp("released", is_evicted=False),
        RowGivenUp("evicted", is_evicted=True),
        RowGivenUp("lost", is_evicted=True),
    ]
    assert slots.drain_given_up() == []


def test_all_rows_are_free_at_once() -> None:
    slots = slots_with_kept(4, "kept")
    for name in ("a", "b"):
        slots.acquire(name)
    slots.release_all()
    slots.check()
    assert (slots.num_free, slots.num_active, slots.num_kept) == (4, 0, 0)
    assert not slots.is_kept("kept")
    assert {slots.acquire(name) for name in "abcd"} == {1, 2, 3, 4}
    slots.check()


def test_a_row_that_becomes_free_is_named() -> None:
    slots = Slots(3)
    row = slots.acquire("a")
    assert slots.release("a") == row
    slots.acquire("b")
    slots.keep("b", "kept")
    assert slots.release("kept") == row
    assert slots.num_free == 3


@pytest.mark.parametrize("owner", ["runs", "kept"])
def test_an_owner_has_one_row(owner: str) -> None:
    slots = slots_with_kept(4, "kept")
    slots.acquire("runs")
    with pytest.raises(ValueError, match=f"'{owner}' has a row already"):
        slots.acquire(owner)
    slots.acquire("ends")
    with pytest.raises(ValueError, match=f"'{owner}' has a row already"):
        slots.keep("ends", owner)
    slots.release_all()
    slots.check()
    assert slots.num_free == 4


def test_check_finds_a_row_that_is_not_accounted_for() -> None:
    slots = Slots(3)
    slots.acquire("a")
    slots._owner[1] = "ghost"
    with pytest.raises(RuntimeError, match="accounted"):
        slots.check()


@pytest.mark.parametrize("seed", range(20))
def test_every_state_stays_with_its_owner_whatever_happens(seed: int) -> None:
    """Play random moves on a list of contents, which only a new owner overwrites."""
    chance, slots = random.Random(seed), Slots(6)
    content: dict[int, str] = {}
    active, kept, given_up = list[str](), list[str](), list[RowGivenUp]()

    def pop(names: list[str]) -> str:
        return names.pop(chance.randrange(len(names)))

    for i in range(300):
        move = chance.choice(["acquire", "keep", "adopt", "release", "forget"])
        if move == "acquire" and slots.can_acquire():
            content[slots.acquire(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
            evicted = [state_id for state_id in kept if not slots.is_kept(state_id)]
            assert evicted in ([], kept[:1])
            given_up += [RowGivenUp(state_id, is_evicted=True) for state_id in evicted]
            kept = [state_id for state_id in kept if slots.is_kept(state_id)]
        elif move == "keep" and active:
            slots.keep(pop(active), f"k{i}")
            content[slots.row(f"k{i}")] = f"k{i}"
            kept.append(f"k{i}")
        elif move == "adopt" and kept:
            state_id = pop(kept)
            assert content[slots.row(state_id)] == state_id
            assert slots.adopt(state_id, f"s{i}")
            content[slots.row(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
            given_up.append(RowGivenUp(state_id, is_evicted=False))
        elif move == "release" and active:
            slots.release(pop(active))
        elif move == "forget" and kept:
            state_id = pop(kept)
            slots.release(state_id)
            given_up.append(RowGivenUp(state_id, is_evicted=False))
        slots.check()
        for name in (*active, *kept):
            assert content[slots.row(name)] == name
        assert slots.num_active == len(active)
        assert slots.num_kept == len(kept)
    assert slots.drain_given_up() == given_up
