"""Translates GBNF, llama.cpp's grammars, to llguidance's Lark.

llguidance's lexer is greedy and does not backtrack. A grammar without recursion therefore becomes
one regular expression, and one with recursion uses single characters as tokens: both accept exactly
what the GBNF accepts.
"""

import re
from graphlib import CycleError, TopologicalSorter

from model.decoding.grammar.errors import GrammarError, shortened
from model.decoding.grammar.lark import quoted

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_REPEAT = re.compile(r"[*+?]|\{\s*([0-9]+)\s*(?:(,)\s*([0-9]*)\s*)?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([tnr\\\"\[\]]))")
_SHORT = {"t": "\t", "n": "\n", "r": "\r"}
_LAST, _SURROGATES = 0x10FFFF, range(0xD800, 0xE000)
_ANY = "/(?s:.)/"


def gbnf_to_lark(source: str) -> str:
    """The same grammar in Lark. Raises GrammarError."""
    try:
        reader = _Reader(source, whole_literals=True)
        if reader.is_recursive():
            reader = _Reader(source, whole_literals=False)
    except RecursionError as error:
        raise GrammarError("the grammar is nested too deeply") from error
    return reader.lark()


class _Reader:
    """Parses the rules in order. Lark rule names are numbers, since GBNF names are less
    restricted."""

    def __init__(self, source: str, whole_literals: bool) -> None:
        self._source = source
        self._place = 0
        self._whole_literals = whole_literals
        self._numbers: dict[str, int] = {}
        self._bodies: dict[str, str] = {}
        self._uses: dict[str, set[str]] = {}
        self._skip(_BLANK_LINES)
        while self._place < len(source):
            self._rule()
            self._skip(_BLANK_LINES)
        for name in ("root", *self._numbers):
            if name not in self._bodies:
                raise GrammarError(
                    shortened(f"neither Lark with a rule start nor GBNF: no rule {name} is defined")
                )

    def is_recursive(self) -> bool:
        """Whether a rule refers to itself, directly or not."""
        try:
            TopologicalSorter(self._uses).prepare()
        except CycleError:
            return True
        return False

    def lark(self) -> str:
        """The whole grammar."""
        rules = [f"{self._lark_name(name)}: {body}" for name, body in self._bodies.items()]
        return "\n".join([f"start: {self._lark_name('root')}", *rules])

    def _lark_name(self, name: str) -> str:
        number = self._numbers.setdefault(name, len(self._numbers))
        return f"{'R' if self._whole_literals else 'r'}{number}"

    def _rule(self) -> None:
        name = self._name()
        self._skip(_BLANK)
        if not self._source.startswith("::=", self._place):
            raise self._error("::= is missing")
        if name in self._bodies:
            raise self._error(f"the rule {name} is defined twice")
        self._place += 3
        self._uses[name] = set()
        self._bodies[name] = ""
        self._bodies[name] = self._alternatives(name, nested=False)
        if self._place < len(self._source) and self._source[self._place] not in "\r\n":
            raise self._error("unexpected input")

    def _alternatives(self, rule: str, nested: bool) -> str:
        blank = _BLANK_LINES if nested else _BLANK
        found = []
        while True:
            self._skip(_BLANK_LINES)
            found.append(self._sequence(rule, nested))
            self._skip(blank)
            if not self._source.startswith("|", self._place):
                return " | ".join(found)
            self._place += 1

    def _sequence(self, rule: str, nested: bool) -> str:
        blank = _BLANK_LINES if nested else _BLANK
        found: list[str] = []
        while (item := self._item(rule)) is not None:
            self._skip(blank)
            while (repeat := _REPEAT.match(self._source, self._place)) is not None:
                self._place = repeat.end()
                item = _repeated(item, repeat)
                self._skip(blank)
            found.append(item)
        return " ".join(found) or '""'

    def _item(self, rule: str) -> str | None:
        """One repeatable item, if there is one."""
        first = self._source[self._place : self._place + 1]
        if first == '"':
            return self._literal()
        if first == "[":
            return self._class()
        if first == ".":
            self._place += 1
            return _ANY
        if first == "(":
            self._place += 1
            inner = self._alternatives(rule, nested=True)
            if not self._source.startswith(")", self._place):
                raise self._error(") is missing")
            self._place += 1
            return f"({inner})"
        if first and first in "<!":
            raise GrammarError("a grammar may not refer to special tokens")
        if _NAME.match(self._source, self._place):
            name = self._name()
            self._uses[rule].add(name)
            return self._lark_name(name)
        return None

    def _literal(self) -> str:
        self._place += 1
        text = ""
        while not self._source.startswith('"', self._place):
            text += chr(self._character())
        self._place += 1
        if self._whole_literals or not text:
            return quoted(text)
        return f"({' '.join(map(quoted, text))})"

    def _class(self) -> str:
        self._place += 1
        negated = self._source.startswith("^", self._place)
        self._place += negated
        ranges = ""
        while not self._source.startswith("]", self._place):
            first = last = self._character()
            if re.compile(r"-[^\]]").match(self._source, self._place):
                self._place += 1
                last = self._character()
            if first > last:
                raise self._error("the range of characters is empty")
            ranges += rf"\x{{{first:x}}}-\x{{{last:x}}}"
        self._place += 1
        if not ranges and not negated:
            raise self._error("the class of characters is empty")
        return f"/[{'^' * negated}{ranges}]/" if ranges else _ANY

    def _character(self) -> int:
        if self._place >= len(self._source):
            raise self._error("unterminated string or class")
        if self._source[self._place] != "\\":
            self._place += 1
            return ord(self._source[self._place - 1])
        escape = _ESCAPE.match(self._source, self._place)
        if escape is None:
            raise self._error("unknown escape")
        digits = escape[1] or escape[2] or escape[3]
        found = ord(_SHORT.get(escape[4], escape[4])) if digits is None else int(digits, 16)
        if found > _LAST or found in _SURROGATES:
            raise self._error(f"{escape[0]} is not a character")
        self._place = escape.end()
        return found

    def _name(self) -> str:
        found = _NAME.match(self._source, self._place)
        if found is None:
            raise self._error("expected a name")
        self._place = found.end()
        return found[0]

    def _skip(self, blank: re.Pattern[str]) -> None:
        found = blank.match(self._source, self._place)
        if found is not None:
            self._place = found.end()

    def _error(self, why: str) -> GrammarError:
        line = self._source.count("\n", 0, self._place) + 1
        near = self._source[self._place : self._place + 20].split("\n")[0]
        return GrammarError(
            shortened(f"neither Lark with a rule start nor GBNF: {why}, line {line} at {near!r}")
        )


def _repeated(item: str, repeat: re.Match[str]) -> str:
    least, comma, most = repeat.groups()
    if least is None:
        return f"({item}){repeat[0]}"
    most = least if comma is None else most
    if most and int(most) == 0:  # Lark has no syntax for this
        return '""'
    return f"({item}){{{least},{most}}}"
