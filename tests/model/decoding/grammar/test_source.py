"""What cannot be enforced is rejected, with the reason."""

import re
from typing import Any

import pytest

from model.decoding.grammar import (
    GrammarCompiler,
    GrammarError,
    GrammarSpec,
)
from model.decoding.grammar.errors import MESSAGE_CHARACTERS
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import schema, write


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"type": "array", "minContains": 2}, "minContains"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"type": "integer", "not": {"const": 3}}, "not"),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"type": "string", "format": "shoe-size"}, "shoe-size"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "foo"}, "foo"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text satisfies"),
        ({"type": "string", "pattern": f"^{'x' * 5000}(?=a)$"}, "look-around"),
        (False, "false"),
        ([1], "JSON object"),
        ("string", "JSON object"),
    ],
)
def test_an_unenforceable_schema_is_rejected(
    value: Any, named: str, grammars: GrammarCompiler
) -> None:
    assert_refused(grammars, schema(value), named)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (GrammarSpec("json_schema", '{"type":'), "not JSON"),
        (GrammarSpec("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "deeply"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", "a(?!b)"), "look-around"),
        (GrammarSpec("regex", r"a\bc"), "lookarounds"),
        (GrammarSpec("regex", "(" * 5000 + "a" + ")" * 5000), "nested"),
        (GrammarSpec("grammar", "start: nobody"), "nobody"),
        (GrammarSpec("grammar", "start: @other"), "other"),
        (GrammarSpec("grammar", 'foo: "a"'), "GBNF"),
        (GrammarSpec("grammar", ""), ""),
        (GrammarSpec("grammar", "root ::= nobody"), "nobody"),
        (GrammarSpec("grammar", 'start: "a" <|endoftext|>'), "special tokens"),
        (GrammarSpec("grammar", 'start: "a<" <[1-3]>'), "special tokens"),
        (GrammarSpec("grammar", "start: a\na[max_tokens=3]: /.*/"), "max_tokens"),
        (GrammarSpec("grammar", 'start: a\na[temperature=2]: "x"'), "temperature"),
        (GrammarSpec("grammar", 'start: a\na[stop="x"]: /.*/'), "stop"),
        (GrammarSpec("grammar", 'start: %json {"not": {}}'), "not"),
        (
            GrammarSpec("grammar", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'),
            "not",
        ),
        (GrammarSpec("grammar", 'start: A\nA: "a" & "b"'), "no text satisfies"),
        (GrammarSpec("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
        (GrammarSpec("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
        (GrammarSpec("choice", ()), "at least one"),
        (GrammarSpec("choice", "abc"), "at least one"),
        (GrammarSpec("regex", ("a", "b")), "one string"),
        (GrammarSpec("regex", "\ud800"), "surrogate"),
        (GrammarSpec("regex", "a" * 300_000), "262,144 bytes"),
        (GrammarSpec("choice", ("a" * 100_000,) * 3), "262,144 bytes"),
    ],
)
def test_a_source_that_is_wrong_is_refused(
    spec: GrammarSpec, named: str, grammars: GrammarCompiler
) -> None:
    assert_refused(grammars, spec, named)


def assert_refused(grammars: GrammarCompiler, spec: GrammarSpec, named: str) -> None:
    """Rejected with one line, also the second time."""
    for _ in range(2):
        with pytest.raises(GrammarError) as refusal:
            grammars.compile(spec)
        message = str(refusal.value)
        assert named in message
        assert 0 < len(message) <= MESSAGE_CHARACTERS
        assert "\n" not in message


def test_signs_of_special_tokens_may_be_text(grammars: GrammarCompiler, tokens: Tokenizer) -> None:
    source = 'start: "<[3]>" /<.>/ // <not> this\n# nor <this>\n'
    text = write(grammars.compile(GrammarSpec("grammar", source)), tokens, 0)
    assert re.fullmatch(r"<\[3\]><.>", text)
