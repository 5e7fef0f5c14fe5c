"""Conjunction of several schemas."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from model.decoding.grammar.json_values import TYPES, equal, fraction, type_of
from model.decoding.grammar.numbers import Number
from model.decoding.grammar.schema_nodes import NUMERIC, refusal

GROUPS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
GROUP_OF = {keyword: group for group, keywords in GROUPS.items() for keyword in keywords}
HANDLED = {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", *NUMERIC, *GROUP_OF}
UNSUPPORTED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
    *("unevaluatedItems", "additionalItems", "propertyNames", "patternProperties"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
"""Keywords that cannot be combined with numbers beyond 64 bits; llguidance enforces some of
them."""

Part = tuple[str, dict[str, Any]]
"""A schema and its location."""


@dataclass
class Demands:
    """Conjunction of several schemas."""

    types: set[str] = field(default_factory=lambda: set(TYPES))
    integer: bool = False
    numeric: dict[str, list[Number]] = field(default_factory=dict)
    listed: list[list[Any]] = field(default_factory=list)
    groups: dict[str, Part] = field(default_factory=dict)

    def add(self, place: str, schema: dict[str, Any]) -> None:
        for keyword, value in schema.items():
            if keyword in UNSUPPORTED and value is not False:
                raise refusal(place, f"{keyword} combined with numbers that need more than 64 bits")
            if keyword in NUMERIC:
                self.numeric.setdefault(keyword, []).append(value)
            elif keyword in ("enum", "const"):
                self.listed.append(value if keyword == "enum" else [value])
            elif keyword in GROUP_OF:
                if self.groups.setdefault(GROUP_OF[keyword], (place, schema))[0] != place:
                    raise refusal(
                        place, f"{keyword} combined with a reference, anyOf, oneOf or allOf"
                    )
            elif keyword == "type":
                types = {value} if isinstance(value, str) else set(value)
                if unknown := types - {*TYPES, "integer"}:
                    raise refusal(place, f"the type {min(unknown)} is unknown")
                self.integer |= "integer" in types and "number" not in types
                self.types &= {"number" if name == "integer" else name for name in types}

    def values(self) -> list[Any]:
        """Values of the lists that the types and bounds allow."""
        first, *others = self.listed
        return [
            value
            for value in first
            if type_of(value) in self.types
            and all(any(equal(value, other) for other in listed) for listed in others)
            and (type_of(value) != "number" or self._allows(fraction(value)))
        ]

    def _allows(self, number: Fraction) -> bool:
        kept = {
            "minimum": lambda bound: number >= bound,
            "exclusiveMinimum": lambda bound: number > bound,
            "maximum": lambda bound: number <= bound,
            "exclusiveMaximum": lambda bound: number < bound,
            "multipleOf": lambda bound: (number / bound).denominator == 1,
        }
        return not (self.integer and number.denominator > 1) and all(
            kept[keyword](fraction(bound))
            for keyword, bounds in self.numeric.items()
            for bound in bounds
        )

    def bounds(self, keywords: tuple[str, str]) -> list[tuple[Number, bool]]:
        """Bounds on one side, with a flag for exclusive ones."""
        return [
            (bound, keyword == keywords[1])
            for keyword in keywords
            for bound in self.numeric.get(keyword, [])
        ]
