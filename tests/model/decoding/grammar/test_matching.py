"""Random texts always satisfy their grammars, at a low cost."""

import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.decoding.grammar import (
    GrammarCompiler,
    GrammarError,
    GrammarSpec,
    fill_masks,
)
from model.decoding.grammar.matching import BURST_S, TOKEN_S, TOO_SLOW
from model.decoding.grammar.vocabulary import NO_CONTINUATION
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import ENDS, LONG, VOCAB_SZ, allowed, schema, write

SUM_LARK = """start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: /[1-9][0-9]{0,3}/ | "(" sum ")"
"""
SUM_GBNF = """root ::= product (("+" | "-") product)*
product ::= atom (("*" | "/") atom)*
atom ::= [1-9] [0-9]{0,3} | "(" root ")"
"""
AMBIGUOUS = 'start: s\ns: s s s s | "a" | "aa" | ""\n'
EXPLODING = "((a{1,100}){1,100}){1,100}"

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ä", "😀", 7, None]}, "maxItems": 4},
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "at": {"type": "string", "format": "date"},
        "boss": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12))
def test_a_json_object_is_one(seed: int, grammars: GrammarCompiler, tokens: Tokenizer) -> None:
    text = write(grammars.compile(GrammarSpec("json_object")), tokens, seed)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(12))
def test_a_text_satisfies_its_schema(
    seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    text = write(grammars.compile(schema(PERSON)), tokens, seed)
    jsonschema.validate(json.loads(text), PERSON)


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    names = draw(st.lists(st.text(max_size=4), max_size=4, unique=True))
    needed = [name for name in names if draw(st.booleans())]
    return {
        "type": "object",
        "properties": {name: draw(values) for name in names},
        "required": needed,
        "additionalProperties": False,
    }


def arrays(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string", "format": "ipv4"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(lambda text: {"const": text}, st.text(max_size=5)),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 2000),
    ),
    st.lists(
        st.one_of(st.text(max_size=5), st.integers(-99, 99), st.none(), st.booleans()),
        min_size=1,
        max_size=4,
    ).map(lambda values: {"enum": values}),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda values: st.one_of(
        objects(values),
        arrays(values),
        st.lists(values, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=SCHEMAS, seed=st.integers(0, 1000))
def test_a_text_satisfies_any_schema(
    value: Any, seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    text = write(grammars.compile(schema(value)), tokens, seed)
    jsonschema.validate(json.loads(text), value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{1,8}@[a-z]{1,8}\.(org|com)",
        r"(ab|a)*c?",
        r"[ä😀]{3}",
        r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}",
        r"a/b\\c",
        'a\n\x7f"[/#]',
        r"^yes$|^no$",
        "",
    ],
)
def test_a_regular_expression_matches_all_of_the_text(
    regex: str, seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    def fits(text: str) -> bool:
        return re.fullmatch(regex, text) is not None

    assert fits(write(grammars.compile(GrammarSpec("regex", regex)), tokens, seed, fits))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("source", [SUM_LARK, SUM_GBNF])
def test_a_text_satisfies_its_grammar(
    source: str, seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    text = write(grammars.compile(GrammarSpec("grammar", source)), tokens, seed)
    assert re.fullmatch(r"[0-9()*/+-]+", text)
    assert text.count("(") == text.count(")")
    assert not re.search(r"[(*/+-][)*/+-]|\(\)|[0-9]\(|\)[0-9]|[0-9]{5}", text)


@settings(max_examples=60, deadline=None)
@given(choices=st.lists(st.text(max_size=8), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_a_choice_is_one_of_its_strings(
    choices: list[str], seed: int, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    grammar = grammars.compile(GrammarSpec("choice", tuple(choices)))
    assert write(grammar, tokens, seed, lambda text: text in choices) in choices


@pytest.mark.parametrize(
    "source",
    [
        'start: "a" end\nend: "b"',
        '%import common.INT\n?start: "a" end\n?end: "b"',
        'start[capture]: "a" end\nend: "b"',
        '%llguidance {}\n\n// a comment\nstart : "a" end\nend: "b"',
        'root ::= "a" end\nend ::= "b"',
        '# a comment\nend ::= "b"\nroot ::= "a" end',
    ],
)
def test_both_dialects_are_known_by_their_first_rule(
    source: str, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    assert write(grammars.compile(GrammarSpec("grammar", source)), tokens, 0) == "ab"


def test_every_choice_can_be_made(grammars: GrammarCompiler, tokens: Tokenizer) -> None:
    choices = ("a", "ab", "äh", "😀", "")
    grammar = grammars.compile(GrammarSpec("choice", choices))
    assert {write(grammar, tokens, seed) for seed in range(60)} == set(choices)


@pytest.mark.parametrize("text", ["ä", "😀", "日本", "e\u0301"])
def test_a_character_may_be_spread_over_tokens(
    text: str, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    written = json.dumps({"name": text, "tags": []}, ensure_ascii=False, separators=(",", ":"))
    matcher = grammars.compile(schema(PERSON)).matcher()
    for byte in written.encode():
        token_id = tokens.token_bytes.index(bytes([byte]))
        if token_id in allowed(matcher):
            assert matcher.accept(token_id)
        else:
            break
    matcher = grammars.compile(schema(PERSON)).matcher()
    for token_id in tokens.encode(written):
        assert token_id in allowed(matcher)
        assert matcher.accept(token_id)
    assert matcher.is_complete


def test_special_tokens_have_no_place_in_a_text(
    grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    """Their names are ordinary text, spelled out."""
    choices = tuple(f"{name}!" for name in tokens.special_tokens)
    grammar = grammars.compile(GrammarSpec("choice", choices))
    assert write(grammar, tokens, 0) in choices
    anything = grammars.compile(GrammarSpec("regex", "(?s:.*)")).matcher()
    ids = allowed(anything)
    assert {i for i in ids if i < 4} == set(ENDS)
    assert max(ids) < tokens.num_tokens < VOCAB_SZ


@pytest.mark.parametrize("layout", [(",", ":"), (", ", ": ")])
def test_json_may_be_compact_or_spaced(
    layout: tuple[str, str], grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    text = json.dumps({"a": [1, {"b": None}, [], {}], "c": "x y"}, separators=layout)
    matcher = grammars.compile(GrammarSpec("json_object")).matcher()
    for token_id in tokens.encode(text):
        assert matcher.accept(token_id), text
    assert matcher.is_complete


@pytest.mark.parametrize("value", [PERSON, {"type": "array", "items": {}, "maxItems": 9}])
def test_white_space_has_an_end(
    value: dict[str, Any], grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    """Even for a model that generates it wherever it can."""
    matcher, written = grammars.compile(schema(value)).matcher(), b""
    chance = random.Random(0)
    for _ in range(LONG):
        ids = [i for i in allowed(matcher) if i not in ENDS]
        if not ids:
            break
        blank = [i for i in ids if not tokens.bytes_of(i).strip()]
        chosen = chance.choice(blank or ids)
        assert matcher.accept(chosen)
        written += tokens.bytes_of(chosen)
    outside = re.sub(rb'"([^"\\]|\\.)*("|$)', b"s", written, flags=re.DOTALL)
    assert not re.search(rb"\s\s|[^ \S]|\s[:,\]}]|[\[{]\s", outside), outside


def test_texts_of_one_grammar_are_independent(grammars: GrammarCompiler, tokens: Tokenizer) -> None:
    grammar = grammars.compile(schema(PERSON))
    first, second = grammar.matcher(), grammar.matcher()
    before = allowed(second)
    write(grammar, tokens, 1)
    assert first.accept(tokens.encode("{")[0])
    assert allowed(second) == before
    assert allowed(first) != before


def test_masks_of_many_texts(grammars: GrammarCompiler, tokens: Tokenizer) -> None:
    matchers = [
        grammars.compile(spec).matcher()
        for spec in (GrammarSpec("json_object"), GrammarSpec("choice", ("b", "c")), schema(PERSON))
    ]
    masks = np.full((3, (VOCAB_SZ + 31) // 32), -1, np.int32)
    fill_masks(matchers, masks)
    for matcher, mask in zip(matchers, masks, strict=True):
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert list(np.flatnonzero(bits)) == allowed(matcher)
    assert [tokens.bytes_of(i) for i in allowed(matchers[1])] == [b"b", b"c"]


def test_a_token_that_is_not_allowed_ends_that_text_alone(
    grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    grammar = grammars.compile(GrammarSpec("choice", ("yes", "no")))
    matcher, other = grammar.matcher(), grammar.matcher()
    assert not matcher.accept(tokens.encode("z")[0])
    assert matcher.failure
    assert "\n" not in matcher.failure
    assert allowed(matcher) == []
    assert not matcher.is_complete
    assert not matcher.may_end
    assert allowed(other)


def test_a_grammar_without_a_continuation_is_a_failure(
    grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    source = 'start: "a" B | "c"\nB: "b" & "d"\n'
    matcher = grammars.compile(GrammarSpec("grammar", source)).matcher()
    matcher.accept(tokens.encode("a")[0])
    assert allowed(matcher) == []
    assert matcher.failure == NO_CONTINUATION


def test_a_model_without_end_tokens(tokens: Tokenizer) -> None:
    """A size at which llguidance's mask has one word more than the network's."""
    made = GrammarCompiler(tokens, tokens.num_tokens, ())
    assert tokens.num_tokens % 32 == 0
    try:
        matcher = made.compile(GrammarSpec("choice", ("a", "ab"))).matcher()
        states = []
        for letter in "ab":
            ids = allowed(matcher, tokens.num_tokens)
            states.append((len(ids), matcher.may_end, matcher.is_complete))
            assert matcher.accept(next(i for i in ids if tokens.bytes_of(i) == letter.encode()))
        ids = allowed(matcher, tokens.num_tokens)
        states.append((len(ids), matcher.may_end, matcher.is_complete))
        assert states == [(2, False, False), (1, True, False), (0, True, True)]
        assert matcher.failure is None
    finally:
        made.close()


@pytest.mark.long
@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec("regex", "(a|aa)*b"),
        GrammarSpec("regex", "(a*)*b"),
        GrammarSpec("regex", "a{1,100000}"),
        GrammarSpec("regex", EXPLODING),
        GrammarSpec("regex", "(.*a.{20}){1,20}"),
        GrammarSpec("regex", "(a?){2000}a{2000}"),
        GrammarSpec("grammar", AMBIGUOUS),
        GrammarSpec("grammar", 'start: a{1,1000000}\na: "a" | "b" a\n'),
        GrammarSpec(
            "grammar",
            "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"|',
        ),
        schema({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),
        schema({"type": "string", "maxLength": 10**9}),
        schema({"type": "array", "minItems": 10**6}),
        schema({"allOf": [{"type": "string", "pattern": f"^.*{c}.*$"} for c in "abcdefghijkl"]}),
        schema({"type": "integer", "allOf": [{"multipleOf": p} for p in (7919, 7907, 7901)]}),
        schema(
            {
                "$ref": "#/$defs/a0",
                "$defs": {
                    **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)},
                    "a30": {"type": "integer"},
                },
            }
        ),
    ],
)
def test_a_hostile_source_is_refused_or_costs_little(
    spec: GrammarSpec, grammars: GrammarCompiler
) -> None:
    """The processor time of a text stays within its budget and one token."""
    try:
        matcher = grammars.compile(spec).matcher()
    except GrammarError:
        return
    chance, begin, num_tokens = random.Random(0), time.thread_time(), 0
    while num_tokens < 400:
        ids = [i for i in allowed(matcher) if i not in ENDS]
        if not ids or not matcher.accept(chance.choice(ids)):
            break
        num_tokens += 1
    spent = time.thread_time() - begin
    choosing = 0.002 * num_tokens
    assert spent < BURST_S + TOKEN_S * num_tokens + choosing + 0.5


def test_a_grammar_that_takes_too_long_ends_its_text(
    grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    matcher = grammars.compile(GrammarSpec("grammar", AMBIGUOUS)).matcher()
    letter = tokens.encode("a")[0]
    for _ in range(2000):
        allowed(matcher)
        if not matcher.accept(letter):
            break
    assert matcher.failure == TOO_SLOW
    assert allowed(matcher) == []
