"""Translates a JSON schema to llguidance's form.

llguidance keeps numbers as 64-bit floats. A schema with numbers that do not fit is written as a
grammar, which delegates to llguidance the parts it handles correctly.
"""

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from model.decoding.grammar.demands import HANDLED
from model.decoding.grammar.errors import GrammarError, one_line, shortened
from model.decoding.grammar.json_values import fraction, numbers_in
from model.decoding.grammar.schema_nodes import (
    DEFINITIONS,
    MAX_MULTIPLE,
    NUMERIC,
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMAS,
    is_changed,
    nodes,
    refusal,
)
from model.decoding.grammar.schema_writer import GrammarWriter, library

MAX_DIGITS = 400
"""Of a bound."""

COUNTS = (
    *("minLength", "maxLength", "minItems", "maxItems"),
    *("minProperties", "maxProperties", "minContains", "maxContains"),
)
LISTS = ("allOf", "anyOf", "oneOf", "enum")
JOINING = {"$ref", "allOf", "anyOf", "oneOf"}


def library_schema(source: str) -> str:
    """The schema in llguidance's form. Raises GrammarError, though not for every error."""
    try:
        schema = json.loads(source, parse_float=_float)
        if schema is True:
            return library("{}")
        if schema is False:
            raise GrammarError("the schema false allows nothing")
        if not isinstance(schema, dict):
            raise GrammarError("a schema must be a JSON object, true or false")
        _check(schema)
        if any(is_changed(node) for _, node in nodes(schema, schema)):
            return GrammarWriter(schema).grammar()
        return library(json.dumps(schema))
    except RecursionError as error:
        raise GrammarError("the schema is nested too deeply") from error
    except ValueError as error:
        if isinstance(error, GrammarError):
            raise
        raise GrammarError(one_line(f"the schema is not JSON: {error}")) from error


def _float(text: str) -> float:
    value = float(text)
    if math.isfinite(value) and Decimal(repr(value)) != Decimal(text):
        raise GrammarError(shortened(f"a 64-bit float cannot hold the number {text}"))
    return value


def _check(schema: dict[str, Any]) -> None:
    """Reject invalid numbers, and write counts as integers."""
    multiples: set[Fraction] = set()
    is_merged = False
    for place, node in nodes(schema, schema):
        if "x-guidance" in node:
            raise GrammarError("x-guidance is not supported in a schema")
        for keyword, value in node.items():
            if keyword not in (*SCHEMA_MAPS, *SCHEMA_LISTS, *SCHEMAS, *DEFINITIONS) and any(
                isinstance(number, float) and not math.isfinite(number)
                for number in numbers_in(value)
            ):
                raise refusal(f"{place}/{keyword}", "the number is not a 64-bit float")
            if keyword in NUMERIC:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise refusal(place, f"{keyword} must be a number")
                if abs(value) >= 10**MAX_DIGITS:
                    raise refusal(place, f"{keyword} has more than {MAX_DIGITS} digits")
            if keyword in COUNTS and isinstance(value, float) and value.is_integer():
                node[keyword] = int(value)
            if keyword in LISTS and not isinstance(value, list):
                raise refusal(place, f"{keyword} must be a list")
        kinds = node.get("type", [])
        if not isinstance(kinds, str | list) or not all(isinstance(kind, str) for kind in kinds):
            raise refusal(place, "type must be a string or a list of strings")
        if "multipleOf" in node:
            if node["multipleOf"] <= 0:
                raise refusal(place, "multipleOf must be greater than 0")
            multiples.add(fraction(node["multipleOf"]))
        is_merged |= "allOf" in node
        is_merged |= bool(len(node.keys() & HANDLED) > 1 and node.keys() & JOINING)
    scale = math.lcm(*(multiple.denominator for multiple in multiples))
    together = math.prod(int(multiple * scale) for multiple in multiples)
    if is_merged and len(multiples) > 1 and together > MAX_MULTIPLE:
        raise GrammarError("the common multiple of multipleOf values is too large")
