"""Regular expressions for ranges of JSON numbers, exact for bounds of any size.

A number satisfies a bound both as a decimal and as the nearest 64-bit float, which is what most
JSON parsers read. Bounded numbers are written without an exponent.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction

EXACT = 2**53
"""Largest integer range that 64-bit floats represent exactly."""

WHOLE = "(?:0|[1-9][0-9]*)"
FRACTION = r"(?:\.[0-9]+)?"

Number = int | float


def integer_range(low: int | None, high: int | None) -> str:
    """A Lark terminal for the integers from `low` to `high`."""
    return _terminal(f"-?{WHOLE}", _decimal(low), _decimal(high))


def number_range(low: float | None, high: float | None) -> str:
    """A Lark terminal for the numbers from `low` to `high`."""
    return _terminal(
        f"-?{WHOLE}{FRACTION}",
        None if low is None else _edges(low)[1],
        None if high is None else _edges(high)[0],
    )


def integer_from(bound: Number, exclusive: bool) -> int:
    """The least integer that a lower bound allows."""
    edge = _edges(bound)[1]
    least = math.ceil(edge)
    return least + 1 if exclusive and least == edge else least


def float_from(bound: Number, exclusive: bool) -> float:
    """The least 64-bit float that a lower bound allows. Raises OverflowError if there is none."""
    nearest = float(bound)
    if Fraction(nearest) < bound or (exclusive and Fraction(nearest) == bound):
        nearest = math.nextafter(nearest, math.inf)
    if math.isinf(nearest):
        raise OverflowError
    return nearest


def _edges(bound: Number) -> tuple[Decimal, Decimal]:
    """The value as written and as stored, in ascending order. They differ for 1e23."""
    if isinstance(bound, int):
        return Decimal(bound), Decimal(bound)
    bound += 0.0  # -0.0 is 0.0
    written = Decimal(repr(bound))
    stored = Decimal(bound) if abs(bound) > EXACT else written
    return min(written, stored), max(written, stored)


def _decimal(value: int | None) -> Decimal | None:
    return None if value is None else Decimal(value)


def _terminal(form: str, low: Decimal | None, high: Decimal | None) -> str:
    """The intersection of these expressions."""
    parts = [form]
    if low is not None:
        parts.append(_at_least(low))
    if high is not None:
        parts.append(_at_most(high))
    return " & ".join(f"/{part}/" for part in parts)


def _at_least(bound: Decimal) -> str:  # copy_negate: the minus sign rounds
    if bound < 0:
        return f"{WHOLE}{FRACTION}|-(?:{_magnitude_to(bound.copy_negate())})"
    return _magnitude_from(bound)


def _at_most(bound: Decimal) -> str:
    if bound < 0:
        return f"-(?:{_magnitude_from(bound.copy_negate())})"
    return f"-{WHOLE}{FRACTION}|{_magnitude_to(bound)}"


def _magnitude_from(bound: Decimal) -> str:
    """Unsigned numbers that are at least this."""
    whole, fraction = _digits(bound)
    if not fraction:
        return f"(?:{_whole_from(whole)}){FRACTION}"
    above = _whole_from(str(int(whole) + 1))
    parts = [f"{_short(fraction)}[0-9]*"]
    for prefix, digit in _places(fraction):
        if digit < 9:
            parts.append(f"{prefix}[{digit + 1}-9][0-9]*")
    return f"(?:{above}){FRACTION}|{_short(whole)}\\.(?:{'|'.join(parts)})"


def _magnitude_to(bound: Decimal) -> str:
    """Unsigned numbers that are at most this."""
    whole, fraction = _digits(bound)
    parts = []
    if whole != "0":
        parts.append(f"(?:{_whole_to(str(int(whole) - 1))}){FRACTION}")
    if not fraction:
        return "|".join([*parts, f"{_short(whole)}(?:\\.0+)?"])
    below = [f"{_short(fraction)}0*"]
    for prefix, digit in _places(fraction):
        if prefix:
            below.append(prefix)
        if digit > 0:
            below.append(f"{prefix}[0-{digit - 1}][0-9]*")
    return "|".join([*parts, f"{_short(whole)}(?:\\.(?:{'|'.join(below)}))?"])


def _whole_from(digits: str) -> str:
    """Non-negative integers that are at least this."""
    size = len(digits)
    parts = [f"[1-9][0-9]{{{size},}}", _short(digits)]
    for place, (prefix, digit) in enumerate(_places(digits)):
        if digit < 9:
            parts.append(f"{prefix}[{digit + 1}-9][0-9]{{{size - 1 - place}}}")
    return "|".join(parts)


def _whole_to(digits: str) -> str:
    """Non-negative integers that are at most this."""
    size = len(digits)
    parts = [_short(digits)]
    if size > 1:
        parts.append(f"0|[1-9][0-9]{{0,{size - 2}}}")
    for place, (prefix, digit) in enumerate(_places(digits)):
        least = 1 if place == 0 and size > 1 else 0
        if digit > least:
            parts.append(f"{prefix}[{least}-{digit - 1}][0-9]{{{size - 1 - place}}}")
    return "|".join(parts)


def _digits(value: Decimal) -> tuple[str, str]:
    """Digits before and after the decimal point, without trailing zeros."""
    whole, _, fraction = f"{value:f}".partition(".")
    return whole, fraction.rstrip("0")


def _places(digits: str) -> list[tuple[str, int]]:
    """Each digit with the expression for the digits before it."""
    return [(_short(digits[:place]), int(digit)) for place, digit in enumerate(digits)]


def _short(digits: str) -> str:
    """An expression for these digits."""
    return re.sub(r"(\d)\1{4,}", lambda run: f"{run[1]}{{{len(run[0])}}}", digits)
