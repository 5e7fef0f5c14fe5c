"""What a text has to keep to, as a request says it and as the library wants it said."""

import json
import re
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]

AFTER_ITEM, AFTER_KEY = ", ?", ": ?"
"""What may stand between JSON's values: texts have one line, compact or as `json.dumps` writes it.
Where more white space may come, a weak model goes on with it for ever, or for as long as it may."""

MAX_SOURCE_BYTES = 256 * 1024
MESSAGE_CHARACTERS = 200
"""A source that is refused must not come back as its own error message."""

_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')
_IS_LARK = re.compile(r"^\s*([?!]?start\s*(\[[^\]]*\]\s*)?:(?!:)|%llguidance\b)", re.MULTILINE)
_UNWANTED_OPTION = re.compile(r"\b(temperature|max_tokens|stop|stop_capture)\s*=")
_HINT = re.compile(r"\. (Enable|If you) .*|\s*<non-verbose/>|\s*<backtrace>.*", re.DOTALL)


class GrammarError(ValueError):
    """No text can be made to keep to this source; the message is one line."""


class GrammarBusyError(Exception):
    """Others' sources are being compiled; this one was not looked at in time."""


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
        words = " | ".join(map(_quoted, spec.source))
        return LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
    if not isinstance(spec.source, str):
        raise GrammarError(f"the source of {spec.kind} is one string")
    if spec.kind == "json_object":
        return _json('{"type":"object"}')
    if spec.kind == "json_schema":
        return _json_schema(spec.source)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    return LLMatcher.grammar_from_lark(_lark(spec.source))


def one_line(message: str) -> str:
    """The library's message without its hints, its context and its length."""
    message = _HINT.sub("", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        first = f"invalid regular expression: {errors[0]}"
    else:
        first = lines[0] if lines else "the source cannot be compiled"
    if len(first) > MESSAGE_CHARACTERS:
        return first[: MESSAGE_CHARACTERS - 3] + "..."
    return first


def _quoted(word: str) -> str:
    """A string of Lark, which JSON's are but for one character that JSON does not escape."""
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")


def _json_schema(source: str) -> str:
    try:
        schema = json.loads(source)
    except RecursionError as error:
        raise GrammarError("the schema is nested too deeply") from error
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from error
    if schema is True:
        return _json("{}")
    if schema is False:
        raise GrammarError("the schema false allows nothing")
    if not isinstance(schema, dict):
        raise GrammarError("a schema is a JSON object, true or false")
    if "x-guidance" in schema:
        raise GrammarError("x-guidance is not supported in a schema")
    return _json(source)


def _json(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": False,
                "item_separator": AFTER_ITEM,
                "key_separator": AFTER_KEY,
                "coerce_one_of": False,
                "lenient": False,
            },
        )
    except ValueError as error:
        raise GrammarError(one_line(str(error))) from error


def _lark(source: str) -> str:
    lark = source if _IS_LARK.search(source) else _converted(source)
    bare = _QUOTED.sub("", lark)
    if "<" in bare:
        raise GrammarError("a grammar may not refer to special tokens")
    if option := _UNWANTED_OPTION.search(bare):
        raise GrammarError(f"the option {option[1]} of a rule is not supported")
    return lark


def _converted(gbnf: str) -> str:
    try:
        return gbnf_to_lark(gbnf)
    except RecursionError as error:
        raise GrammarError("the grammar is nested too deeply") from error
    except Exception as error:  # the converter has no error of its own for most of what it meets
        raise GrammarError(one_line(f"neither Lark with a rule start nor GBNF: {error}")) from error
