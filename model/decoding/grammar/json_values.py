"""JSON values: their types, numbers and spelling."""

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from model.decoding.grammar.lark import quoted
from model.decoding.grammar.numbers import EXACT, Number

TYPES = ("null", "boolean", "number", "string", "array", "object")


def literal(value: Any) -> str:
    """The value as Lark."""
    if isinstance(value, dict):
        pairs = [f"{literal(name)} COLON {literal(inner)}" for name, inner in value.items()]
        return f'"{{" {" COMMA ".join(pairs)} "}}"'
    if isinstance(value, list):
        return f'"[" {" COMMA ".join(map(literal, value))} "]"'
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT and value:
        value = int(value)
    return quoted(json.dumps(value, ensure_ascii=False))


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def equal(one: Any, other: Any) -> bool:
    """JSON equality: 1 equals 1.0 and not true."""
    if type_of(one) != type_of(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return bool(one == other)


def numbers_in(value: Any) -> Iterator[Number]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def fraction(value: Number) -> Fraction:
    """The exact value as written."""
    return Fraction(repr(value))
