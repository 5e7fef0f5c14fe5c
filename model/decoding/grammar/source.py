"""Grammar sources: as requests give them, and in llguidance's form."""

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
    """A constraint on a text.

    json_object: any JSON object; the source is empty.
    json_schema: a JSON schema (Draft 2020-12 unless `$schema` says otherwise), as JSON. Properties
      come in the schema's order. What llguidance cannot enforce is rejected by name.
    regex: a regular expression in the syntax of Rust's regex crate; it must match the whole text.
    grammar: a context-free grammar in llguidance's Lark if it has a rule `start:`, else in
      llama.cpp's GBNF with the root rule `root`. No references to special tokens, and no rule
      options that change sampling or cut the text.
    choice: one of these strings, in a tuple.
    """

    kind: Kind
    source: str | tuple[str, ...] = ""

    @property
    def num_bytes(self) -> int:
        """Size of the source in UTF-8. Raises GrammarError if it cannot be encoded."""
        parts = (self.source,) if isinstance(self.source, str) else self.source
        try:
            return sum(len(part.encode()) for part in parts)
        except UnicodeEncodeError as error:
            raise GrammarError("the source has an unpaired surrogate") from error

    def check_size(self) -> None:
        """Raises GrammarError for a source that is too large."""
        if self.num_bytes > MAX_SOURCE_BYTES:
            raise GrammarError(f"the source has more than {MAX_SOURCE_BYTES:,} bytes")


def library_source(spec: GrammarSpec) -> str:
    """The source in llguidance's form. Raises GrammarError, though not for every error."""
    if spec.kind == "choice":
        if isinstance(spec.source, str) or not spec.source:
            raise GrammarError("a choice needs at least one string")
        words = " | ".join(map(quoted, spec.source))
        return LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
    if not isinstance(spec.source, str):
        raise GrammarError(f"the source of {spec.kind} must be one string")
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
