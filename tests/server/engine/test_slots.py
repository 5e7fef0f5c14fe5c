"""Rows have one owner, decode rows stay together, warm rows give way to new sequences."""

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
        slots.begin_decoding(name)
    slots.end_decoding("b")
    slots.keep_warm("b", "warm")
    slots.release_all()
    slots.check()
    assert (slots.num_free, slots.num_active, slots.num_warm, slots.num_decoding) == (4, 0, 0, 0)
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
    """Play random moves on a list of contents, applying the swaps as the engine does."""
    chance, slots = random.Random(seed), Slots(6)
    content: dict[int, str] = {}
    reading, decoding, warm = set[str](), set[str](), set[str]()

    def swap(rows: tuple[int, int]) -> None:
        a, b = rows
        content[a], content[b] = content.get(b, ""), content.get(a, "")

    for i in range(300):
        move = chance.choice(["acquire", "begin", "end", "warm", "adopt", "release"])
        if move == "acquire" and slots.can_acquire():
            content[slots.acquire(f"s{i}")] = f"s{i}"
            reading.add(f"s{i}")
            warm = {name for name in warm if slots.is_warm(name)}
        elif move == "begin" and reading:
            name = reading.pop()
            swap(slots.begin_decoding(name))
            decoding.add(name)
        elif move in ("end", "warm") and decoding:
            name = decoding.pop()
            swap(slots.end_decoding(name))
            if move == "warm":
                slots.keep_warm(name, f"w{i}")
                content[slots.row(f"w{i}")] = f"w{i}"
                warm.add(f"w{i}")
            else:
                slots.release(name)
        elif move == "adopt" and warm:
            name = warm.pop()
            assert slots.adopt(name, f"s{i}")
            content[slots.row(f"s{i}")] = f"s{i}"
            reading.add(f"s{i}")
        elif move == "release" and reading:
            slots.release(reading.pop())
        slots.check()
        for name in reading | decoding | warm:
            assert content[slots.row(name)] == name
        assert {slots.row(name) for name in decoding} == set(range(1, len(decoding) + 1))
        assert slots.num_active == len(reading) + len(decoding)
        assert slots.num_warm == len(warm)
