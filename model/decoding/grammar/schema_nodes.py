"""Traversal of a schema, and which of its numbers llguidance would change."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from model.decoding.grammar.errors import GrammarError, one_line
from model.decoding.grammar.json_values import fraction, numbers_in
from model.decoding.grammar.numbers import EXACT

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
NUMERIC = (*LOWER, *UPPER, "multipleOf")

MAX_MULTIPLE = 2**32 - 1
"""llguidance's limit for `multipleOf`."""

SCHEMA_MAPS = ("properties", "patternProperties", "dependentSchemas")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SCHEMAS = (
    *("items", "additionalItems", "additionalProperties", "contains", "propertyNames"),
    *("not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
)
DEFINITIONS = ("$defs", "definitions")


def refusal(place: str, why: str) -> GrammarError:
    """Long locations are cut at the front: their end is more specific."""
    shown = place if len(place) <= 100 else f"...{place[-97:]}"
    return GrammarError(one_line(f"{shown}: {why}"))


def nodes(
    schema: Any, root: Any, place: str = "#", seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and its subschemas, each with its location; given a root, also definitions and
    referenced schemas."""
    seen = set() if seen is None else seen
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    yield place, schema
    maps = SCHEMA_MAPS if root is None else (*SCHEMA_MAPS, *DEFINITIONS)
    inside: list[tuple[str, Any]] = []
    for keyword, value in schema.items():
        if keyword in maps and isinstance(value, dict):
            inside += [(f"{place}/{keyword}/{escaped(name)}", sub) for name, sub in value.items()]
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            inside += [(f"{place}/{keyword}/{i}", sub) for i, sub in enumerate(value)]
        elif keyword in SCHEMAS:
            inside.append((f"{place}/{keyword}", value))
        elif keyword == "$ref" and root is not None and isinstance(value, str):
            inside += [(value, sub) for sub in pointed(root, value)]
    for where, sub in inside:
        yield from nodes(sub, root, where, seen)


def pointed(root: Any, reference: str) -> list[Any]:
    """The target of a reference within the schema, if it exists."""
    found, (base, _, pointer) = root, reference.partition("#")
    if base or (pointer and not pointer.startswith("/")):
        return []
    for name in unquote(pointer).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return []
    return [found]


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def is_changed(node: dict[str, Any]) -> bool:
    """Whether llguidance would change this schema's own numbers, subschemas aside."""
    if any(abs(node[keyword]) > EXACT for keyword in NUMERIC if keyword in node):
        return True
    if "multipleOf" in node and fraction(node["multipleOf"]).numerator > MAX_MULTIPLE:
        return True
    if node.keys() & {"exclusiveMinimum", "exclusiveMaximum"} and node.get("type") != "integer":
        return True  # decimals: llguidance does not always exclude 0
    listed = [node.get("const"), node.get("enum")]
    return any(abs(n) > EXACT for n in numbers_in(listed) if isinstance(n, int))
