"""Schemas with numbers that llguidance would change are enforced exactly or rejected by name."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.decoding.grammar import GrammarCompiler, GrammarError, GrammarSpec
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import accepts, schema, write

INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
UINT64 = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
EVENT = {
    "type": "object",
    "properties": {
        "id": {"$ref": "#/$defs/id"},
        "at": UINT64,
        "note": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
        "causes": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        "ratio": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "kind": {"anyOf": [{"const": 2**53 + 1}, {"type": "null"}]},
    },
    "required": ["id", "kind"],
    "additionalProperties": False,
    "$defs": {"id": {"title": "Id", **INT64}},
}


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        (INT64, ["-9223372036854775808", "9223372036854775807", "0"], ["9223372036854775808"]),
        (INT64, ["-1"], ["-9223372036854775809", "1.0", "10000000000000000000"]),
        (UINT64, ["0", "18446744073709551615"], ["18446744073709551616", "-1"]),
        ({"const": 2**53 + 1}, ["9007199254740993"], ["9007199254740992"]),
        ({"const": {"a": [2**64 + 1, "é"]}}, ['{"a":[18446744073709551617, "é"]}'], ["{}"]),
        ({"enum": [10**25, "a", None, -(2**60) - 1]}, [f"{10**25}", "null", '"a"'], ["1e25"]),
        ({"enum": [2**60 + 1, 5.5, 1.0], "type": "integer"}, [f"{2**60 + 1}", "1"], ["5.5"]),
        ({"enum": [2**60, 2**60 + 1], "minimum": 2**60 + 1}, [f"{2**60 + 1}"], [f"{2**60}"]),
        ({"const": 2**60 + 1, "enum": [2**60, 2**60 + 1]}, [f"{2**60 + 1}"], [f"{2**60}"]),
        ({"minimum": 10**30}, [f"{10**30}", '"a"', "[]", f"{10**31}.5"], ["1", f"{10**30 - 1}"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0"]),
        ({"type": "number", "exclusiveMaximum": 0.3}, ["0.25", "-1"], ["0.3", f"0.2{'9' * 25}"]),
        ({"type": "number", "exclusiveMinimum": 2, "multipleOf": 0.5}, ["2.5", "3"], ["2", "2.6"]),
        ({"type": "integer", "minimum": 2**60, "maximum": 2**60 + 9, "multipleOf": 7},
         [f"{v}" for v in range(2**60, 2**60 + 10) if v % 7 == 0], [f"{2**60}"]),
        ({"type": ["integer", "null"], "minimum": 2**60}, ["null", f"{2**60}"], ["1", '"a"']),
        ({"$ref": "#/$defs/i", "maximum": 2**60, "$defs": {"i": {"type": "integer"}}},
         [f"{2**60}", "-1"], [f"{2**60 + 1}", "0.5"]),
        ({"allOf": [{"type": "integer"}, {"minimum": 2**60}, {"maximum": 2**60 + 3}]},
         [f"{2**60 + 3}"], ["1", f"{2**60 + 4}"]),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}], "maximum": -(2**60) - 1},
         [f"{-(2**60) - 1}", '"a"'], [f"{-(2**60)}", "null"]),
        ({"oneOf": [{"const": 2**60}, {"const": 2**60 + 1}, {"type": "null"}]},
         [f"{2**60 + 1}", "null"], [f"{2**60 + 2}"]),
        ({"oneOf": [
            {"type": "object", "properties": {"t": {"const": "a"}, "n": INT64}, "required": ["t"]},
            {"type": "object", "properties": {"t": {"const": "b"}}, "required": ["t"]}]},
         ['{"t":"a","n":9223372036854775807}', '{"t":"b","n":1.5}'], ['{"t":"a","n":1.5}']),
        ({"type": "object", "properties": {"a": INT64}},
         ["{}", '{"a":1}', '{"a":1,"b":2, "c": null}', '{"b":2}', '{"aa":1}'],
         ['{"a":1,"a":null}', '{"a":1,"\\u0061":null}', '{"b":1,"a":null}']),
        ({"type": "object", "properties": {"a": INT64, "b": {}}, "required": ["b", "z"],
          "additionalProperties": UINT64},
         ['{"a":-1,"b":"x","z":1}', '{"b":"x","z":1,"y":2}'], ['{"b":"x"}', '{"b":1,"z":-1}']),
        ({"type": "array", "prefixItems": [INT64, {"type": "null"}], "items": UINT64,
          "minItems": 1, "maxItems": 4},
         ["[-1]", "[-1,null]", "[-1, null,1]"], ["[]", "[-1,1]", "[-1,null,-1]", "[1,null,1,1,1]"],
        ),
        ({"type": "array", "items": INT64, "minItems": 2}, ["[1,2]", "[1,2,3]"], ["[1]", "[]"]),
        ({"type": "array", "items": INT64, "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "array", "items": INT64, "maxItems": 2}, ["[]", "[1]", "[1,2]"], ["[1,2,3]"]),
        ({"type": "array", "prefixItems": [INT64], "items": False}, ["[]", "[1]"], ["[1,2]"]),
        ({"type": "integer", "minimum": 0.5, "maximum": 2.0**63}, ["1", f"{2**63}"], ["0"]),
        ({"type": "string", "maxLength": 1.0}, ['"a"', '""'], ['"ab"']),
        ({"type": "integer", "default": 2**70, "maximum": 2**60}, [f"{2**60}"], [f"{2**60 + 1}"]),
    ],
)  # fmt: skip
def test_numbers_are_enforced(
    value: Any, good: list[str], bad: list[str], grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    grammar = grammars.compile(schema(value))
    assert [text for text in good if not accepts(grammar, tokens, text)] == []
    assert [text for text in bad if accepts(grammar, tokens, text)] == []


@pytest.mark.parametrize("seed", range(8))
def test_a_text_satisfies_numbers_of_64_bits(
    seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    jsonschema.validate(json.loads(write(grammars.compile(schema(EVENT)), tokens, seed)), EVENT)


BOUNDS = st.one_of(
    st.integers(-20, 20),
    st.integers(-(2**66), 2**66),
    st.sampled_from([0.5, -0.1, 0.3, 1e19, -1e22, 1e-7, 0.0]),
)


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    value: dict[str, Any] = {}
    if draw(st.integers(0, 9)):
        value["type"] = draw(st.sampled_from(["integer", "number", ["integer", "null"]]))
    for keyword in draw(
        st.lists(
            st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
            max_size=2,
        )
    ):
        value[keyword] = draw(BOUNDS)
    if draw(st.integers(0, 5)) == 0:
        value["multipleOf"] = draw(st.sampled_from([1, 2, 3, 10, 2**33]))
    return value


LISTED = st.lists(BOUNDS | st.none() | st.just("a"), min_size=1, max_size=4).map(
    lambda values: {"enum": values}
)
SCHEMAS = st.recursive(
    st.one_of(numbers(), LISTED, st.just({"type": "null"})),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"oneOf": some}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"allOf": some}),
        st.builds(lambda one, more: {"anyOf": [one, {"type": "null"}], **more}, inner, numbers()),
        numbers().map(lambda more: {"$ref": "#/$defs/x", **more}),
        st.builds(
            lambda first, second: {
                "type": "object",
                "properties": {"a": first, "b": second},
                "required": ["b"],
                "additionalProperties": False,
            },
            inner,
            inner,
        ),
        st.builds(lambda one: {"type": "array", "items": one, "maxItems": 2}, inner),
    ),
    max_leaves=5,
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(value=SCHEMAS, referred=numbers(), seed=st.integers(0, 1000))
def test_a_text_satisfies_any_numbers(
    value: dict[str, Any],
    referred: dict[str, Any],
    seed: int,
    grammars: GrammarCompiler,
    tokens: Tokenizer,
) -> None:
    value = {"$defs": {"x": referred}, **value}
    try:
        grammar = grammars.compile(schema(value))
    except GrammarError:
        return
    text = write(grammar, tokens, seed)
    jsonschema.validate(json.loads(text), value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"properties": {"a/b": {"multipleOf": 2**40}}}, "#/properties/a~1b: multipleOf"),
        ({"type": "integer", "multipleOf": 7, "minimum": 2**60}, "#: multipleOf"),
        ({"type": "integer", "multipleOf": 0}, "#: multipleOf must be greater than 0"),
        ({"items": {"minimum": 10**400}}, "#/items: minimum has more than 400 digits"),
        ({"type": "number", "minimum": 10**350}, "#: a bound exceeds 64-bit floats"),
        ({"items": {"maximum": float("inf")}}, "#/items/maximum: the number is not"),
        ({"enum": [1, float("inf")]}, "#/enum: the number is not a 64-bit float"),
        ({"default": float("inf")}, "#/default: the number is not a 64-bit float"),
        ({"minimum": "3"}, "#: minimum must be a number"),
        ({"minimum": True}, "#: minimum must be a number"),
        ({"type": "integer", "minimum": 2**60, "maximum": 2**60 - 1}, "no text satisfies"),
        ({"enum": [2**60], "type": "string"}, "no text satisfies"),
        ({"enum": [2**60, "a"], "pattern": "^a"}, "#: enum combined with"),
        ({"minimum": 2**60, "not": {"const": 2**61}}, "#: not combined with numbers"),
        ({"items": INT64, "uniqueItems": True}, "#: uniqueItems combined with numbers"),
        ({"properties": {"a": INT64}, "patternProperties": {"b": {}}}, "#: patternProperties"),
        ({"items": INT64, "allOf": [{"maxItems": 3}]}, "maxItems combined with a reference"),
        ({"oneOf": [{"type": "number"}, {"type": "integer", "minimum": 2**60}]}, "#: options of"),
        ({"$ref": "http://a/b", "minimum": 2**60}, "#: the reference http://a/b"),
        ({"allOf": 3, "minimum": 2**60}, "#: allOf must be a list"),
        ({"items": {"type": [{}]}}, "#/items: type must be a string or a list of strings"),
        ({"type": "int", "minimum": 2**60}, "#: the type int is unknown"),
        (
            {"allOf": [{"multipleOf": 65536}, {"multipleOf": 65537}]},
            "the common multiple of multipleOf",
        ),
    ],
)
def test_what_cannot_be_enforced_is_rejected_by_name(
    value: Any, named: str, grammars: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError) as refusal:
        grammars.compile(schema(value))
    assert named in str(refusal.value)


def test_digits_that_would_be_lost_are_refused(grammars: GrammarCompiler) -> None:
    source = '{"type": "number", "maximum": 0.10000000000000000001}'
    with pytest.raises(GrammarError, match=r"cannot hold the number 0\.10000000000000000001"):
        grammars.compile(GrammarSpec("json_schema", source))
