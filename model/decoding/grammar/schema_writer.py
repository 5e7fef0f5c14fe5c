"""Writes a schema as a Lark grammar with exact numbers."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, TypeVar

from llguidance import LLMatcher

from model.decoding.grammar.demands import GROUPS, HANDLED, UNSUPPORTED, Demands, Part
from model.decoding.grammar.errors import GrammarError, one_line
from model.decoding.grammar.json_values import TYPES, equal, fraction, literal, numbers_in, type_of
from model.decoding.grammar.lark import quoted
from model.decoding.grammar.numbers import (
    EXACT,
    Number,
    float_from,
    integer_from,
    integer_range,
    number_range,
)
from model.decoding.grammar.schema_nodes import (
    DEFINITIONS,
    LOWER,
    UPPER,
    escaped,
    is_changed,
    nodes,
    pointed,
    refusal,
)

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

AFTER_ITEM, AFTER_KEY = ", ?", ": ?"
"""Whitespace between JSON values: one line, compact or as `json.dumps` writes it. Where more is
allowed, a weak model may generate whitespace without end."""

OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": AFTER_ITEM,
    "key_separator": AFTER_KEY,
    "coerce_one_of": False,
    "lenient": False,
}

MAX_LISTED = 1000
"""Maximum number of multiples to enumerate."""

CHARACTER = r'(?:\\["\\bfnrt]|[^"\\\x00-\x1F\x7F])'
"""Property names: one spelling each, so that no name can appear twice."""

T = TypeVar("T", int, float)
Bound = tuple[Number, bool]
"""A bound and whether it is exclusive."""


class _Nothing(Exception):
    """No value keeps to this."""


def library(schema: str) -> str:
    """The schema as llguidance accepts it. Raises GrammarError."""
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError as error:
        raise GrammarError(one_line(str(error))) from error


class GrammarWriter:
    """Writes a schema as a Lark grammar."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._names: dict[object, str] = {}
        self._numbers = itertools.count()
        self._lines = [f"COMMA: /{AFTER_ITEM}/", f"COLON: /{AFTER_KEY}/"]
        self._has_ids = any("$id" in node for place, node in nodes(root, root) if place != "#")

    def grammar(self) -> str:
        """The grammar of the whole schema."""
        try:
            self._lines.append(f"start: {self._rule([('#', self._root)])}")
        except _Nothing as error:
            raise GrammarError("no text satisfies this") from error
        return LLMatcher.grammar_from_lark("\n".join(self._lines))

    def _rule(self, parts: Sequence[tuple[str, Any]]) -> str:
        """Name of a rule for the conjunction of these schemas. Raises _Nothing."""
        return self._named(tuple(place for place, _ in parts), lambda: self._body(parts))

    def _named(self, key: object, body: Callable[[], str]) -> str:
        if key not in self._names:
            name = self._names[key] = f"r{next(self._numbers)}"
            try:
                self._lines.append(f"{name}: {body()}")
            except _Nothing:
                del self._names[key]
                raise
        return self._names[key]

    def _inline(self, schema: dict[str, Any]) -> str:
        """Delegates to llguidance."""
        draft = {"$schema": self._root["$schema"]} if "$schema" in self._root else {}
        kept = {name: value for name, value in schema.items() if name not in DEFINITIONS}
        text = json.dumps(draft | kept | {"x-guidance": OPTIONS})
        return self._named(text, lambda: f"%json {text}")

    def _body(self, parts: Sequence[tuple[str, Any]]) -> str:
        flat = self._flattened(parts)
        if not flat:
            return self._inline({})
        if len(flat) == 1 and not any(
            "$ref" in node or is_changed(node) for _, node in nodes(flat[0][1], None)
        ):
            return self._inline(flat[0][1])
        if (options := self._options(flat)) is not None:
            return self._either([partial(self._rule, some) for some in options])
        demands = self._demands(flat)
        if demands.listed:
            return self._values(demands, flat[0][0])
        easy = [
            name
            for name in TYPES
            if name in demands.types
            and not (name == "number" and (demands.numeric or demands.integer))
            and not (name in ("array", "object") and name in demands.groups)
        ]
        strings = demands.groups.get("string", ("", {}))[1]
        bodies: list[Callable[[], str]] = []
        if easy:
            text = {name: strings[name] for name in GROUPS["string"] if name in strings}
            bodies.append(partial(self._inline, {"type": easy} | text))
        hard = demands.types.difference(easy)
        if "number" in hard:
            bodies.append(partial(self._number, demands, flat[0][0]))
        if "array" in hard:
            bodies.append(partial(self._array, *demands.groups["array"]))
        if "object" in hard:
            bodies.append(partial(self._object, *demands.groups["object"]))
        return self._either(bodies)

    def _either(self, bodies: Sequence[Callable[[], str]]) -> str:
        found: dict[str, None] = {}
        for body in bodies:
            try:
                found[body()] = None
            except _Nothing:
                continue
        if not found:
            raise _Nothing
        return " | ".join(found)

    def _flattened(self, parts: Sequence[tuple[str, Any]]) -> list[Part]:
        """References and allOf resolved; empty schemas dropped."""
        found: dict[str, dict[str, Any]] = {}
        left, seen = list(parts), set()
        while left:
            place, schema = left.pop(0)
            if schema is False:
                raise _Nothing
            if schema is True or place in seen:
                continue
            seen.add(place)
            if not isinstance(schema, dict):
                raise refusal(place, "a schema must be a JSON object, true or false")
            reference = schema.get("$ref")
            if reference is not None:
                left.append((str(reference), self._target(place, reference)))
            for i, sub in enumerate(schema.get("allOf", [])):
                left.append((f"{place}/allOf/{i}", sub))
            own = {name: schema[name] for name in schema if name not in ("$ref", "allOf")}
            if own.keys() & (HANDLED | UNSUPPORTED):
                found[place] = own
        return list(found.items())

    def _target(self, place: str, reference: object) -> Any:
        found = pointed(self._root, reference) if isinstance(reference, str) else []
        if not found or self._has_ids:
            raise refusal(
                place, f"the reference {reference} combined with numbers of more than 64 bits"
            )
        return found[0]

    def _options(self, parts: list[Part]) -> list[list[tuple[str, Any]]] | None:
        """One list of schemas per option of the first anyOf or oneOf."""
        for i, (place, schema) in enumerate(parts):
            for keyword in ("anyOf", "oneOf"):
                if keyword in schema:
                    own = {name: schema[name] for name in schema if name != keyword}
                    rest = [*parts[:i], (f"{place} without {keyword}", own), *parts[i + 1 :]]
                    options = [
                        [*rest, (f"{place}/{keyword}/{j}", option)]
                        for j, option in enumerate(schema[keyword])
                    ]
                    if keyword == "oneOf" and not all(
                        self._are_distinct(one, other)
                        for j, one in enumerate(options)
                        for other in options[:j]
                    ):
                        raise refusal(place, "options of oneOf may overlap")
                    return options
        return None

    def _demands(self, parts: list[Part]) -> Demands:
        demands = Demands()
        for place, schema in parts:
            demands.add(place, schema)
        return demands

    def _are_distinct(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        """Whether the two are obviously disjoint."""
        try:
            first, second = self._flattened(one), self._flattened(other)
        except _Nothing:
            return True
        for here, there in ((first, second), (second, first)):
            if (options := self._options(here)) is not None:
                return all(self._are_distinct(option, there) for option in options)
        a, b = self._demands(first), self._demands(second)
        for demands in (a, b):
            if demands.listed:
                demands.types = {type_of(value) for value in demands.values()}
        if not a.types & b.types:
            return True
        if a.listed and b.listed:
            return not any(equal(x, y) for x in a.values() for y in b.values())
        if a.types & b.types != {"object"} or not {"object"} <= a.groups.keys() & b.groups.keys():
            return False
        sides = [demands.groups["object"] for demands in (a, b)]
        names = set.intersection(*(set(schema.get("required", [])) for _, schema in sides))
        return any(
            self._are_distinct(*([_member(place, schema, name)] for place, schema in sides))
            for name in names
        )

    def _values(self, demands: Demands, place: str) -> str:
        values = demands.values()
        if not values:
            raise _Nothing
        for kind in {type_of(value) for value in values} & demands.groups.keys():
            raise refusal(place, f"enum combined with other constraints on {kind}s")
        return " | ".join(map(literal, values))

    def _number(self, demands: Demands, place: str) -> str:
        lower = demands.bounds(LOWER)
        upper = [(-bound, exclusive) for bound, exclusive in demands.bounds(UPPER)]
        if demands.numeric.get("multipleOf"):
            return self._multiple(demands, place, lower, upper)
        ranges: list[Callable[[], str]] = []
        if demands.integer or any(abs(bound) > EXACT for bound, _ in (*lower, *upper)):
            ranges.append(lambda: integer_range(*_edges(integer_from, lower, upper)))
        if not demands.integer:
            ranges.append(lambda: number_range(*_edges(float_from, lower, upper)))
        try:
            return self._terminal(self._either(ranges))
        except OverflowError as error:
            raise refusal(place, "a bound exceeds 64-bit floats") from error

    def _terminal(self, expression: str) -> str:
        """Name of a terminal."""
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {expression}")
        return name

    def _multiple(
        self, demands: Demands, place: str, lower: list[Bound], upper: list[Bound]
    ) -> str:
        """Multiples are enumerated, or delegated to llguidance with bounds that are multiples."""
        step = reduce(_common, map(fraction, demands.numeric["multipleOf"]))
        if demands.integer:
            step = _common(step, Fraction(1))
        low, high = _edges(partial(_factor_from, step), lower, upper)
        if low is not None and high is not None and high - low < MAX_LISTED:
            listed = (_decimal_text(factor * step) for factor in range(low, high + 1))
            return " | ".join(map(quoted, listed))
        inline: dict[str, Any] = {"type": "integer" if demands.integer else "number"}
        inline["multipleOf"] = _plain(step)
        for keyword, factor in (("minimum", low), ("maximum", high)):
            if factor is not None:
                inline[keyword] = _plain(factor * step)
        if is_changed(inline) or any(fraction(n) > EXACT for n in numbers_in(inline)):
            raise refusal(place, "multipleOf with numbers that need more than 64 bits")
        return self._inline(inline)

    def _object(self, place: str, schema: dict[str, Any]) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise refusal(place, "properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise refusal(place, "required must be a list of strings")
        names = list(dict.fromkeys([*properties, *required]))
        members: list[tuple[str, bool]] = []
        for name in names:
            try:
                value = self._rule([_member(place, schema, name)])
            except _Nothing:
                if name in required:
                    raise
                continue
            members.append((f"{literal(name)} COLON {value}", name in required))
        others = f'/"{CHARACTER}*"/'
        if names:
            others += f" & ~({'|'.join(map(literal, names))})"
        after, first = '""', '""'
        try:
            value = self._rule([_member(place, schema, None)])
            other = f"{self._terminal(others)} COLON {value}"
            after = self._named((place, "others"), lambda: f"(COMMA {other})*")
            first = f"({other} {after})?"
        except _Nothing:
            pass
        for member, is_required in reversed(members):
            rest = after
            begun = f"{member} {rest}"
            first = begun if is_required else f"{begun} | {self._own(first)}"
            next_member = f"COMMA {member}" if is_required else f"(COMMA {member})?"
            after = self._own(f"{next_member} {rest}")
        return f'"{{" {self._own(first)} "}}"'

    def _own(self, body: str) -> str:
        """A new rule for this body."""
        return self._named(object(), lambda: body)

    def _array(self, place: str, schema: dict[str, Any]) -> str:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if not isinstance(first, list) or isinstance(rest, list):
            raise refusal(
                place, "items as a list combined with numbers that need more than 64 bits"
            )
        for keyword in ("minItems", "maxItems"):
            count = schema.get(keyword, 0)
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31:
                raise refusal(place, f"{keyword} must be a number from 0 to {2**31 - 1:,}")
        items: list[str] = []
        for i, sub in enumerate(first):
            try:
                items.append(self._rule([(f"{place}/prefixItems/{i}", sub)]))
            except _Nothing:
                most, rest = i if most is None else min(i, most), False
                break
        try:
            more = self._rule([(f"{place}/items", rest)])
        except _Nothing:
            more = None
            most = len(items) if most is None else min(len(items), most)
        if most is not None and least > most:
            raise _Nothing
        items = items[:most]
        tail = ""
        if more is not None and (most is None or most > len(items)):
            fewest = max(least - len(items), 0)
            limit = "" if most is None else most - len(items)
            if items:
                tail = f"(COMMA {more}){{{fewest},{limit}}}"
            else:
                limit = "" if most is None else most - 1
                tail = f"{more} (COMMA {more}){{{max(fewest - 1, 0)},{limit}}}"
                tail = tail if least else f"({tail})?"
        for i, item in reversed(list(enumerate(items))):
            tail = f"{'COMMA ' if i else ''}{item} {tail}"
            tail = tail if i < least else f"({tail})?"
        return f'"[" {tail} "]"'


def _member(place: str, schema: dict[str, Any], name: str | None) -> tuple[str, Any]:
    """The schema of a property, or of additional properties if name is None."""
    if name is not None and name in schema.get("properties", {}):
        return f"{place}/properties/{escaped(name)}", schema["properties"][name]
    return f"{place}/additionalProperties", schema.get("additionalProperties", True)


def _edges(
    least: Callable[[Number, bool], T], lower: list[Bound], upper: list[Bound]
) -> tuple[T | None, T | None]:
    """The tightest bounds on both sides; upper bounds come negated."""
    low = max((least(*bound) for bound in lower), default=None)
    high = max((least(*bound) for bound in upper), default=None)
    if low is not None and high is not None and low > -high:
        raise _Nothing
    return low, None if high is None else -high


def _factor_from(step: Fraction, bound: Number, exclusive: bool) -> int:
    """The first multiple of a step that a lower bound allows."""
    factor = math.ceil(fraction(bound) / step)
    return factor + 1 if exclusive and factor * step == fraction(bound) else factor


def _common(one: Fraction, other: Fraction) -> Fraction:
    """The least common multiple."""
    scale = math.lcm(one.denominator, other.denominator)
    return Fraction(math.lcm(int(one * scale), int(other * scale)), scale)


def _decimal_text(value: Fraction) -> str:
    """A terminating decimal, without an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    digits = 0
    while (value * 10**digits).denominator > 1:
        digits += 1
    whole, fraction = divmod(abs(int(value * 10**digits)), 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{fraction:0{digits}}"


def _plain(value: Fraction) -> Number:
    return value.numerator if value.denominator == 1 else float(value)
