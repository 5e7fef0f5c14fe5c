"""Rows have one owner and keep it, warm rows give way to new sequences."""

import random

import pytest

from server.engine.slots import Slots


def test_warm_rows_are_given_up_oldest_first() -> None:
    slots = Slots(2)
    for name in ("a", "b"):
        slots.acquire(name)
        slots.keep_warm(name, f"warm-{name}")
    slots.acquire("c")
    assert not slots.is_warm("warm-a")
    assert slots.is_warm("warm-b")
    assert slots.adopt("warm-b", "d")
    assert not slots.adopt("warm-b", "e")
    assert not slots.can_acquire()


def test_all_rows_are_free_at_once_and_warm_states_are_told() -> None:
    slots = Slots(4)
    for name in ("a", "b", "c"):
        slots.acquire(name)
    slots.keep_warm("b", "warm")
    slots.release_all()
    slots.check()
    assert (slots.num_free, slots.num_active, slots.num_warm) == (4, 0, 0)
    assert not slots.is_warm("warm")
    assert slots.take_evicted() == ["warm"]
    assert slots.acquire("d") == 4


def test_a_row_that_becomes_free_is_named() -> None:
    slots = Slots(3)
    row = slots.acquire("a")
    assert slots.release("a") == row
    slots.acquire("b")
    slots.keep_warm("b", "warm")
    assert slots.release("warm") == row
    assert slots.num_free == 3


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
    active, warm = list[str](), list[str]()

    def take(names: list[str]) -> str:
        return names.pop(chance.randrange(len(names)))

    for i in range(300):
        move = chance.choice(["acquire", "warm", "adopt", "release", "forget"])
        if move == "acquire" and slots.can_acquire():
            content[slots.acquire(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
            warm = [name for name in warm if slots.is_warm(name)]
        elif move == "warm" and active:
            name = take(active)
            slots.keep_warm(name, f"w{i}")
            content[slots.row(f"w{i}")] = f"w{i}"
            warm.append(f"w{i}")
        elif move == "adopt" and warm:
            name = take(warm)
            assert content[slots.row(name)] == name
            assert slots.adopt(name, f"s{i}")
            content[slots.row(f"s{i}")] = f"s{i}"
            active.append(f"s{i}")
        elif move == "release" and active:
            slots.release(take(active))
        elif move == "forget" and warm:
            slots.release(take(warm))
        slots.check()
        for name in (*active, *warm):
            assert content[slots.row(name)] == name
        assert slots.num_active == len(active)
        assert slots.num_warm == len(warm)
