"""Stop strings are found as by a search through the whole text, at a constant cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import Token
from server.engine.stops import StopFinder
from tests.server.engine.test_text import output
from tests.server.engine.words import byte_tokens

LETTERS = st.text("ab", max_size=12)


def by_hand(text: str, start: int, stops: list[str]) -> tuple[int, str] | None:
    """The string that is complete first behind `start`, and where; the longer one of two."""
    found = [
        (at + len(stop), -len(stop), stop)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > start
    ]
    return (min(found)[0], min(found)[2]) if found else None


def held(text: str, stops: list[str]) -> int:
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    early=st.integers(0, 4),
)
def test_any_pieces_are_searched_as_the_whole(
    pieces: list[str], stops: list[str], early: int
) -> None:
    """Before this many pieces a string is ordinary text."""
    finder, text = StopFinder(stops), ""
    for number, piece in enumerate(pieces):
        found = finder.push(piece, may_stop=number >= early)
        expected = None if number < early else by_hand(text + piece, len(text), stops)
        if expected is not None:
            assert found == (expected[0] - len(text), expected[1])
            return
        assert found is None
        text += piece
        assert finder.num_held == held(text, stops)


class CountedText(str):
    """Counts accesses to its characters."""

    num_read = 0

    def __getitem__(self, index: object) -> str:
        CountedText.num_read += 1
        return super().__getitem__(index)  # type: ignore[index]


@pytest.mark.parametrize("stop", ["a" * 1023 + "b", "ab" * 511 + "b", "a" * 1024, "b" + "a" * 1023])
@pytest.mark.parametrize("unit", ["a", "ab", "aaab"])
def test_a_character_costs_the_same_whatever_came_before(stop: str, unit: str) -> None:
    finder = StopFinder([CountedText(stop)])
    CountedText.num_read = 0
    text = unit * (20_000 // len(unit))
    for start in range(0, len(text), 4):
        finder.push(text[start : start + 4], may_stop=False)
    assert CountedText.num_read < 8 * len(text)


@pytest.mark.parametrize("can_rewind", [False, True])
def test_the_memory_of_a_text_that_is_never_final_does_not_grow(can_rewind: bool) -> None:
    text = output("a" * 1000 + "b", can_rewind=can_rewind, returns_tokens=True)
    [a] = byte_tokens("a")
    anchors = 0
    for number in range(10_000):
        anchors += text.push(Token(a), may_stop=True).wants_anchor
        assert text.num_anchors <= 8
        assert len(text._tokens) <= 1600
        assert len(text._emitted) <= 1600
        assert len(text._held_tokens) <= 1000
        assert not number or len(text._later) <= 7
    assert (anchors > 10) == can_rewind
    [b] = byte_tokens("b")
    last = text.push(Token(b), may_stop=True)
    assert (last.stop, last.cuts_token, last.text) == ("a" * 1000 + "b", True, "")
    kept, rest = text.cut()
    assert rest == ""
    assert len(kept) <= 300
