"""What the libraries for structured output are measured with: useful sources and hostile ones."""

import json
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["json_schema", "regex", "lark", "gbnf", "choice"]


@dataclass(frozen=True)
class Case:
    """A source and a text that it accepts. A context-free grammar is written once a dialect."""

    name: str
    kind: Kind
    source: str
    text: str = ""


def _schema(name: str, schema: dict[str, Any], text: Any = None) -> Case:
    written = json.dumps(text, separators=(",", ":"), ensure_ascii=False)
    return Case(name, "json_schema", json.dumps(schema), written)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "at": {"type": "string", "format": "date-time"},
        "state": {"enum": ["new", "paid", "sent", "returned"]},
        "customer": {"$ref": "#/$defs/person"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 20,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"type": "integer", "minimum": 1, "maximum": 999},
                    "note": {"anyOf": [{"type": "string", "maxLength": 80}, {"type": "null"}]},
                },
                "required": ["sku", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["id", "at", "state", "customer", "lines"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "email": {"type": "string", "format": "email"},
                "friends": {"type": "array", "items": {"$ref": "#/$defs/person"}},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}

ORDERED = {
    "id": "9f2c1a34-5b6d-4e7f-8a90-b1c2d3e4f506",
    "at": "2024-08-06T12:30:00Z",
    "state": "paid",
    "customer": {"name": "Zoë", "friends": [{"name": "Bob", "email": "bob@example.org"}]},
    "lines": [{"sku": "ABC-1234", "count": 3, "note": "as a gift, please"}] * 5,
}

ANYTHING = {"title": "A day", "tags": ["sun", "sea"], "n": [1, 2.5, None, {"deep": [True]}]}

SUM = "(12+3)*(4-5/(6+7))-8*(9+10)"
SUM_LARK = """start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]+/
"""
SUM_GBNF = """root ::= product (("+" | "-") product)*
product ::= atom (("*" | "/") atom)*
atom ::= [0-9]+ | "(" root ")"
"""

CHOICES = [f"{place} of the {i}th answer" for i in range(250) for place in ("A", "Be", "C", "Bed")]

USEFUL = [
    _schema("simple object", PERSON, {"name": "Ada Lovelace", "age": 36}),
    _schema("nested, $ref, formats", ORDER, ORDERED),
    _schema("json_object", {"type": "object"}, ANYTHING),
    Case("regex", "regex", r"[a-z]+(\.[a-z]+)*@[a-z]+\.(org|com)", "ada.lovelace@example.org"),
    Case("grammar", "lark", SUM_LARK, SUM),
    Case("grammar", "gbnf", SUM_GBNF, SUM),
    Case("1,000 choices", "choice", json.dumps(CHOICES), CHOICES[777]),
]


def _doubling(depth: int, keyword: str) -> dict[str, Any]:
    """Each definition refers to the next one twice: 2 ** depth if each is followed."""
    rules: dict[str, Any] = {
        f"a{i}": {keyword: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(depth)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**rules, f"a{depth}": {"type": "integer"}}}


def _all_of(patterns: list[str]) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}


def _branches(groups: int, size: int) -> dict[str, Any]:
    """size ** groups objects if all combinations are written out."""

    def one(name: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}

    return {
        "allOf": [{"anyOf": [one(f"p{i}_{j}") for j in range(size)]} for i in range(groups)],
    }


LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = {"type": "string"}

HOSTILE = [
    Case("(a|aa)*b", "regex", "(a|aa)*b"),
    Case("(a*)*b", "regex", "(a*)*b"),
    Case("a{1,100000}", "regex", "a{1,100000}"),
    Case("((a{1,100}){1,100}){1,100}", "regex", "((a{1,100}){1,100}){1,100}"),
    Case("(.*a.{20}){1,20}", "regex", "(.*a.{20}){1,20}"),
    Case("(a?){2000}a{2000}", "regex", "(a?){2000}a{2000}"),
    Case(r"(\p{L}{1,1000}\p{N}){1,100}", "regex", r"(\p{L}{1,1000}\p{N}){1,100}"),
    Case("5,000 parentheses", "regex", "(" * 5000 + "a" + ")" * 5000),
    Case("100 arrays deep", "json_schema", '{"items":' * 100 + "{}" + "}" * 100),
    Case("10,000 arrays deep", "json_schema", '{"items":' * 10_000 + "{}" + "}" * 10_000),
    _schema("allOf doubled 30 times", _doubling(30, "allOf")),
    _schema("anyOf doubled 30 times", _doubling(30, "anyOf")),
    _schema("allOf of 12 anyOf of 4", _branches(12, 4)),
    _schema(
        "1,000 optional properties",
        {"type": "object", "properties": {f"p{i}": TEXT for i in range(1000)}},
    ),
    _schema(
        "10,000 optional properties",
        {"type": "object", "properties": {f"p{i}": TEXT for i in range(10_000)}},
    ),
    _schema("maxLength 10**9", {"type": "string", "maxLength": 10**9}),
    _schema("minItems 10**6", {"type": "array", "minItems": 10**6}),
    _schema("10 patterns at once", _all_of([f"^.*{letter}.*$" for letter in LETTERS[:10]])),
    _schema("26 patterns at once", _all_of([f"^.*{letter}.*$" for letter in LETTERS])),
    _schema("26 loose patterns at once", _all_of([f".*{letter}.*" for letter in LETTERS])),
    _schema("multipleOf 99999989", {"type": "integer", "multipleOf": 99_999_989}),
    _schema(
        "multipleOf of 4 primes",
        {"type": "integer", "allOf": [{"multipleOf": p} for p in (7919, 7907, 7901, 7883)]},
    ),
    Case("s: s s | a |", "lark", 'start: s\ns: s s | "a" | ""\n'),
    Case("s: s s | a |", "gbnf", 'root ::= root root | "a" | ""\n'),
    Case("s: s s s s | a | aa |", "lark", 'start: s\ns: s s s s | "a" | "aa" | ""\n'),
    Case("s: s s s s | a | aa |", "gbnf", 'root ::= root root root root | "a" | "aa" | ""\n'),
    Case("a or b a, 10**6 times", "lark", 'start: a{1,1000000}\na: "a" | "b" a\n'),
    Case("a or b a, 10**6 times", "gbnf", 'root ::= a{1,1000000}\na ::= "a" | "b" a\n'),
    Case(
        "rules doubled 40 times",
        "lark",
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a" | ""',
    ),
    Case(
        "rules doubled 40 times",
        "gbnf",
        "root ::= r0\n"
        + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40))
        + 'r40 ::= "a" | ""',
    ),
    Case(
        "200 rules, one or two of the next",
        "lark",
        "start: r0\n"
        + "".join(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(200))
        + 'r200: "a" | "b" | ""',
    ),
    Case(
        "200 rules, one or two of the next",
        "gbnf",
        "root ::= r0\n"
        + "".join(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(200))
        + 'r200 ::= "a" | "b" | ""',
    ),
    Case("20,000 parentheses", "lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    Case("20,000 parentheses", "gbnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
]

UNSUPPORTED = [
    _schema("uniqueItems", {"type": "array", "uniqueItems": True}),
    _schema("contains", {"type": "array", "contains": {"type": "string"}}),
    _schema("not", {"type": "integer", "not": {"const": 3}}),
    _schema("if/then", {"if": {"type": "string"}, "then": {"maxLength": 3}}),
    _schema("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3}}),
    _schema("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    _schema("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    _schema("oneOf that overlaps", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    _schema("two patterns", _all_of(["^a", "b$"])),
    _schema("pattern and minLength", {"type": "string", "pattern": "^a*$", "minLength": 2}),
    _schema("pattern with lookahead", {"type": "string", "pattern": "(?=a)b"}),
    _schema("unknown format", {"type": "string", "format": "shoe-size"}),
    _schema("$ref elsewhere", {"$ref": "https://example.org/schema"}),
]
"""Each must be enforced or refused; where it is ignored, a text can break its schema."""

BREAKING = {
    "uniqueItems": "[1,1]",
    "contains": "[1]",
    "not": "3",
    "if/then": '"long"',
    "propertyNames": '{"long":1}',
    "dependentRequired": '{"a":1}',
    "unevaluatedProperties": '{"a":1}',
    "oneOf that overlaps": "1",
    "two patterns": '"c"',
    "pattern and minLength": '"a"',
    "pattern with lookahead": '"(?=a)b"',
    "unknown format": '"blue"',
    "$ref elsewhere": "1",
}
"""A text that the schema of this name forbids, or that it says nothing about."""
