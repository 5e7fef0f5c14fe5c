"""Text constrained by a JSON schema, a regular expression, a grammar or a list of strings.

A source is compiled once and shared; each text has its own matcher, which computes the mask of
allowed tokens before every token. Matching uses the llguidance library.
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
