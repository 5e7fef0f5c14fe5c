"""Text that keeps to a JSON schema, a regular expression, a grammar or a list of strings.

A source is compiled once and shared; each text under it has a matcher, which says before every
token which tokens may come next. Matching is done by the llguidance library.
"""

from model.decoding.grammar.compiler import GrammarCompiler
from model.decoding.grammar.errors import GrammarBusyError, GrammarError
from model.decoding.grammar.matching import Grammar, Matcher, fill_masks
from model.decoding.grammar.source import GrammarSpec

__all__ = [
    "Grammar",
    "GrammarBusyError",
    "GrammarCompiler",
    "GrammarError",
    "GrammarSpec",
    "Matcher",
    "fill_masks",
]
