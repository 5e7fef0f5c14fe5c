"""What a text has to keep to, as a request says it and as the library wants it said."""

import re
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher

from model.decoding.grammar.errors import GrammarError
from model.decoding.grammar.gbnf import gbnf_to_lark
from model.decoding.grammar.lark import quoted
from model.decoding.grammar.schema import library_schema

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]

MAX_SOURCE_BYTES = 256 * 1024

_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')
_IS_LARK = re.compile(r"^\s*([?!]?start\s*(\[[^\]]*\]\s*)?:(?!:)|%llguidance\b)", re.MULTILINE)
_UNWANTED_OPTION = re.compile(r"\b(temperature|max_tokens|stop|stop_capture)\s*=")


@dataclass(frozen=True)
class GrammarSpec:
    """What a text has to keep to.

    json_object: any JSON object; the source is empty.
    json_schema: a JSON schema (Draft 2020-12 where `$schema` says nothing), as JSON. Properties
      come in the schema's order. What the library cannot enforce is refused by name.
    regex: a regular expression in the syntax of Rust's regex crate; all of the text must match.
    grammar: a context-free grammar in llguidance's dialect of Lark if it has a rule `start:`, else
      in the GBNF of llama.cpp, whose first rule is `root`. No references to special tokens, and
      of the options of rules none that changes sampling or cuts the text.
    choice: one of these strings, in a tuple.
    """

    kind: Kind
    source: str | tuple[str, ...] = ""

    @property
    def num_bytes(self) -> int:
        """Size of the source in UTF-8. Raises GrammarError for what has no UTF-8."""
        parts = (self.source,) if isinstance(self.source, str) else self.source
        try:
            return sum(len(part.encode()) for part in parts)
        except UnicodeEncodeError as error:
            raise GrammarError("the source has half of a surrogate pair") from error

    def check_size(self) -> None:
        """Raises GrammarError for a source that is too large."""
        if self.num_bytes > MAX_SOURCE_BYTES:
            raise GrammarError(f"the source has more than {MAX_SOURCE_BYTES:,} bytes")


def library_source(spec: GrammarSpec) -> str:
    """The source in the library's own form. Raises GrammarError, not for all errors in it."""
    if spec.kind == "choice":
        if isinstance(spec.source, str) or not spec.source:
            raise GrammarError("a choice needs at least one string")
        words = " | ".join(map(quoted, spec.source))
        return LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
    if not isinstance(spec.source, str):
        raise GrammarError(f"the source of {spec.kind} is one string")
    if spec.kind == "json_object":
        return library_schema('{"type":"object"}')
    if spec.kind == "json_schema":
        return library_schema(spec.source)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    return LLMatcher.grammar_from_lark(_lark(spec.source))


def _lark(source: str) -> str:
    lark = source if _IS_LARK.search(source) else gbnf_to_lark(source)
    bare = _QUOTED.sub("", lark)
    if "<" in bare:
        raise GrammarError("a grammar may not refer to special tokens")
    if option := _UNWANTED_OPTION.search(bare):
        raise GrammarError(f"the option {option[1]} of a rule is not supported")
    return lark
