"""Expressions for numbers match exactly the numbers in the range."""

import math
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.decoding.grammar.numbers import float_from, integer_from, integer_range, number_range

INTEGERS = st.one_of(
    st.integers(-1000, 1000),
    st.integers(-(10**40), 10**40),
    st.sampled_from([-(2**63), 2**63 - 1, 2**64 - 1, 2**53 + 1, 10**18, -(10**19)]),
)
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(-1000, 1000, places=3).map(float),
    st.sampled_from([0.0, 0.1, 0.3, 1e-7, 5e-324, 1e22, 1e23, 1.7976931348623157e308]),
)


def matches(terminal: str, text: str) -> bool:
    parts = terminal.removeprefix("/").removesuffix("/").split("/ & /")
    return all(re.fullmatch(part, text) for part in parts)


@settings(max_examples=300, deadline=None)
@given(low=st.none() | INTEGERS, high=st.none() | INTEGERS, near=INTEGERS)
@example(low=-(2**63), high=2**63 - 1, near=0)
def test_integers_of_a_range(low: int | None, high: int | None, near: int) -> None:
    terminal = integer_range(low, high)
    for centre in (near, low or 0, high or 0, 10 * (low or 0), (high or 0) // 10):
        for value in range(centre - 11, centre + 12):
            expected = (low is None or value >= low) and (high is None or value <= high)
            assert matches(terminal, str(value)) == expected, value
    assert not any(matches(terminal, text) for text in ("", "-", "00", "01", "1.0", "1e1", "+1"))


@st.composite
def texts(draw: st.DrawFn, bound: float) -> str:
    """Spellings of a number near a bound."""
    off = Decimal(draw(st.integers(-30, 30))).scaleb(draw(st.integers(-25, 3)))
    nearest = draw(st.sampled_from([Decimal(repr(bound)), Decimal(bound)]))
    scale = draw(st.sampled_from([Decimal(1), max(nearest, Decimal(1))]))
    return f"{nearest + off * scale:f}"


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(data=st.data(), low=st.none() | FLOATS, high=st.none() | FLOATS)
def test_numbers_of_a_range(data: st.DataObject, low: float | None, high: float | None) -> None:
    text = data.draw(texts(data.draw(st.sampled_from([low or 0.0, high or 0.0]))))
    written = Decimal(text)
    read: list[Decimal | float | int] = [written, float(text)]
    if "." not in text:
        read.append(int(text))
    found = matches(number_range(low, high), text)
    if found:
        assert low is None or all(value >= low for value in read[1:])
        assert high is None or all(value <= high for value in read[1:])
        assert low is None or written >= Decimal(repr(low))
        assert high is None or written <= Decimal(repr(high))
    else:  # it is out of the range, or between a bound and what is stored for it
        edges = [Decimal(repr(b)) for b in (low, high) if b is not None]
        edges += [Decimal(b) for b in (low, high) if b is not None]
        below = low is not None and written < max(Decimal(repr(low)), Decimal(low))
        above = high is not None and written > min(Decimal(repr(high)), Decimal(high))
        assert below or above or text.startswith("-0")


@settings(max_examples=300, deadline=None)
@given(bound=INTEGERS | FLOATS, exclusive=st.booleans())
def test_the_least_that_a_bound_allows(bound: float, exclusive: bool) -> None:
    least = integer_from(bound, exclusive)
    assert least > bound if exclusive else least >= bound
    assert least - 1 < bound or (exclusive and least - 1 <= bound) or abs(bound) > 2**53
    if abs(bound) < 1e308:
        real = float_from(bound, exclusive)
        before = Fraction(math.nextafter(real, -math.inf))
        assert Fraction(real) > Fraction(bound) if exclusive else Fraction(real) >= Fraction(bound)
        assert before <= bound if exclusive else before < bound
