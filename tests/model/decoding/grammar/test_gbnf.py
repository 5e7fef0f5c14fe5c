"""GBNF accepts exactly what it accepts in llama.cpp."""

import contextlib
import itertools
import string
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.decoding.grammar import GrammarCompiler, GrammarError, GrammarSpec
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import accepts

LONGEST = 4

Words = frozenset[str]
"""All texts of up to `LONGEST` characters that are accepted."""


@dataclass(frozen=True)
class Piece:
    """A fragment of a grammar: its source, and what it accepts when `x` accepts some texts."""

    source: str
    kind: str
    inner: tuple["Piece", ...] = ()
    least: int = 0
    most: int = 0

    def words(self, x: Words) -> Words:
        inner = [piece.words(x) for piece in self.inner]
        if self.kind == "rule":
            return x
        if self.kind == "either":
            return frozenset().union(*inner)
        if self.kind == "sequence":
            found: Words = frozenset([""])
            for words in inner:
                found = joined(found, words)
            return found
        if self.kind == "repeat":
            power = frozenset([""])
            found = power if self.least == 0 else frozenset()
            for count in range(1, self.most + 1):
                power = joined(power, inner[0])
                found |= power if count >= self.least else frozenset()
            return found
        return frozenset(self.kind.split(","))


def joined(first: Words, second: Words) -> Words:
    return frozenset(a + b for a in first for b in second if len(a + b) <= LONGEST)


LEAVES = st.sampled_from(
    [
        *(Piece(f'"{text}"', text) for text in ("", "a", "b", "ab", "aba")),
        Piece("[a]", "a"),
        Piece("[ab]", "a,b"),
        Piece("[^b-z]", "a"),
        Piece(r'"\x61\u0062"', "ab"),
        Piece("x", "rule"),
    ]
)
REPEATS = [("*", 0, LONGEST), ("+", 1, LONGEST), ("?", 0, 1), ("{2}", 2, 2), ("{1,}", 1, LONGEST)]


def repeated(piece: Piece, repeat: tuple[str, int, int]) -> Piece:
    sign, least, most = repeat
    return Piece(f"({piece.source}){sign}", "repeat", (piece,), least, most)


PIECES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(repeated, inner, st.sampled_from(REPEATS)),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda some: Piece(f"({' '.join(p.source for p in some)})", "sequence", tuple(some))
        ),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda some: Piece(f"({' | '.join(p.source for p in some)})", "either", tuple(some))
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(root=PIECES, rule=PIECES)
def test_any_grammar_allows_what_it_says(
    root: Piece, rule: Piece, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    x: Words = frozenset()
    while (more := rule.words(x)) != x:
        x = more
    assume(x)  # a rule without any text is refused as a rule, even where another would do
    source = f"root ::= {root.source}\nx ::= {rule.source}\n"
    texts = ("".join(t) for n in range(LONGEST + 1) for t in itertools.product("ab", repeat=n))
    allowed: set[str] = set()
    with contextlib.suppress(GrammarError):  # where no text satisfies it
        grammar = grammars.compile(GrammarSpec("grammar", source))
        allowed = {text for text in texts if accepts(grammar, tokens, text)}
    assert allowed == root.words(x)


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (r'root ::= "\U0001F600\u00e9\x41\x7f\t\n\r\\\"\[\]"', ['😀éA\x7f\t\n\r\\"[]'], ["😀éA"]),
        (r"root ::= [\u00e0-\u00ef\U0001F600-\U0001F64F]", ["é", "😀", "🙏"], ["z", "ÿ", "🚀"]),
        (r"root ::= [^\x00-\x7f]", ["é", "😀", "\x80"], ["a", "\x7f"]),
        (r"root ::= [а-яё]", ["ж", "ё"], ["a", "Ж"]),
        ("root ::= [a&&b~~c]", list("abc&~"), ["d", ""]),
        (r"root ::= [a-] [\]\\] [[/] [-^]", ["a]/-", r"-\[^"], ["b]/-", "a]//"]),
        ("root ::= .", ["a", "\n", "\r", "é", "😀", "\x00"], ["", "aa"]),
        ("root ::= [^]", ["a", "\n"], ["", "aa"]),
        ('root ::= "a // b" "#" "/*" # a "comment"', ["a // b#/*"], ["a "]),
        ('root ::= "a" |\n# one\n"b" |', ["a", "b", ""], ["ab"]),
        ('root ::= ( "a"\n | "b" # two\n | ( "c" ( "d" ) ) )+', ["acdb"], ["c", ""]),
        ('root ::= "ab" { 1 , 2 } "c"{0}', ["ab", "abab"], ["", "abb", "ababab", "abc"]),
        ('root ::= "ab"+?', ["", "abab"], ["a"]),
        ('\r\nroot ::= a\r\na ::= "x"\r\n', ["x"], ["x\r"]),
    ],
)
def test_strings_classes_and_repetition(
    source: str, good: list[str], bad: list[str], grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    grammar = grammars.compile(GrammarSpec("grammar", source))
    assert [text for text in good if not accepts(grammar, tokens, text)] == []
    assert [text for text in bad if accepts(grammar, tokens, text)] == []


NAMES = [
    *("start", "Start", "START", "a-b", "a_b", "A-b", "aB", "a-B", "ab", "1", "-", "_", "r0", "R0"),
    *("import", "ignore", "declare", "override", "json", "regex", "lark", "stop", "max_tokens"),
    *("temperature", "capture", "lazy", "suffix", "EOS", "WS", "COMMA", "root-", "Root"),
]


@pytest.mark.parametrize("recursive", [False, True])
def test_every_name_is_distinct(
    recursive: bool, grammars: GrammarCompiler, tokens: Tokenizer
) -> None:
    letters = string.ascii_letters[: len(NAMES)]
    rules = "".join(f'{name} ::= "{one}"\n' for name, one in zip(NAMES, letters, strict=True))
    source = f"{rules}root ::= {' '.join(NAMES)}{' (root)?' if recursive else ''}\n"
    grammar = grammars.compile(GrammarSpec("grammar", source))
    assert accepts(grammar, tokens, letters)
    assert accepts(grammar, tokens, letters * 2) == recursive
    assert not accepts(grammar, tokens, letters[::-1])


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (r'root ::= "\q"', "unknown escape, line 1"),
        (r'root ::= "\u12"', "unknown escape"),
        (r'root ::= "\ud83d\ude00"', r"\ud83d is not a character"),
        (r'root ::= "a"' + "\n" + r"x ::= [\U00110000]", r"\U00110000 is not a character, line 2"),
        ("root ::= [b-a]", "range of characters is empty"),
        ("root ::= []", "class of characters is empty"),
        ("root ::= nobody", "no rule nobody"),
        ('a ::= "x"', "no rule root"),
        ('root ::= "a"\nroot ::= "b"', "root is defined twice"),
        ("root ::= <think>", "special tokens"),
        ("root ::= !<[7]>", "special tokens"),
        ('root ::= "a"{,2}', "unexpected input"),
        ('root ::= "a"{2,1}', "2"),
        ('root ::= "a" % "b"', "unexpected input"),
        ('root ::= ("a"', ") is missing"),
        ('root ::= "a', "unterminated string"),
        ('root := "a"', "::= is missing"),
        ("root ::= root", "no text satisfies this"),
    ],
)
def test_what_is_not_gbnf_is_refused_by_name(
    source: str, named: str, grammars: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError) as refusal:
        grammars.compile(GrammarSpec("grammar", source))
    assert named in str(refusal.value)
