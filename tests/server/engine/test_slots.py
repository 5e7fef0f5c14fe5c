"""Rows have one owner; retained states are evicted for new sequences, which is reported."""

import random

import pytest

from server.engine.messages import RowReleased
from server.engine.slots import Slots


def slots_with_kept(num_rows: int, *state_ids: str) -> Slots:
    slots = Slots(num_rows)
    for state_id in state_ids:
        slots.acquire(f"leaves {state_id}")
        slots.retain(f"leaves {state_id}", state_id)
    return slots


def test_retained_rows_are_evicted_oldest_first() -> None:
    slots = slots_with_kept(2, "a", "b")
    slots.acquire("c")
    assert not slots.is_retained("a")
    assert slots.is_retained("b")
    assert slots.adopt("b", "d")
    assert not slots.adopt("b", "e")
    assert slots.num_active == slots.num_rows


def test_a_row_is_given_up_once_however_it_ends() -> None:
    slots = slots_with_kept(4, "adopted", "released", "evicted", "lost")
    assert slots.drain_released() == []
    slots.adopt("adopted", "a")
    assert not slots.adopt("adopted", "b")
    slots.release("a")
    slots.release("released")
    for name in ("c", "d", "e"):
        slots.acquire(name)
    slots.release_all()
    assert slots.drain_released() == [
        RowReleased("adopted", is_evicted=False),
        RowReleased("released", is_evicted=False),
        RowReleased("evicted", is_evicted=True),
        RowReleased("lost", is_evicted=True),
    ]
    assert slots.drain_released() == []


def test_all_rows_are_free_at_once() -> None:
    slots = slots_with_kept(4, "kept")
    for name in ("a", "b"):
        slots.acquire(name)
    slots.release_all()
    slots.check()
    assert (slots.num_free, slots.num_active, slots.num_retained) == (4, 0, 0)
    assert not slots.is_retained("kept")
    assert {slots.acquire(name) for name in "abcd"} == {1, 2, 3, 4}
    slots.check()


def test_a_row_that_becomes_free_is_named() -> None:
    slots = Slots(3)
    row = slots.acquire("a")
    assert slots.release("a") == row
    slots.acquire("b")
    slots.retain("b", "kept")
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
        slots.retain("ends", owner)
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
    """Random moves on a list of contents, which only a new owner overwrites."""
    chance, slots = random.Random(seed), Slots(6)
    content: dict[int, str] = {}
    active, retained, given_up = list[str](), list[str](), list[RowReleased]()

    def pop(names: list[str]) -> str:
        return names.pop(chance.randrange(len(names)))

    for i in range(300):
        move = chance.choice(["acquire", "keep", "adopt", "release", "forget"])
        if move == "acquire" and slots.num_active < slots.num_rows:
            content[slots.acquire(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
            evicted = [state_id for state_id in retained if not slots.is_retained(state_id)]
            assert evicted in ([], retained[:1])
            given_up += [RowReleased(state_id, is_evicted=True) for state_id in evicted]
            retained = [state_id for state_id in retained if slots.is_retained(state_id)]
        elif move == "keep" and active:
            slots.retain(pop(active), f"k{i}")
            content[slots.row(f"k{i}")] = f"k{i}"
            retained.append(f"k{i}")
        elif move == "adopt" and retained:
            state_id = pop(retained)
            assert content[slots.row(state_id)] == state_id
            assert slots.adopt(state_id, f"s{i}")
            content[slots.row(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
            given_up.append(RowReleased(state_id, is_evicted=False))
        elif move == "release" and active:
            slots.release(pop(active))
        elif move == "forget" and retained:
            state_id = pop(retained)
            slots.release(state_id)
            given_up.append(RowReleased(state_id, is_evicted=False))
        slots.check()
        for name in (*active, *retained):
            assert content[slots.row(name)] == name
        assert slots.num_active == len(active)
        assert slots.num_retained == len(retained)
    assert slots.drain_released() == given_up
