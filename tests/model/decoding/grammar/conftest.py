"""One compiler for all tests of grammars."""

from collections.abc import Iterator

import pytest

from model import PRETRAINED
from model.decoding.grammar import (
    GrammarCompiler,
)
from model.text import byte_level
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import ENDS, VOCAB_SZ


@pytest.fixture(scope="session")
def tokens() -> Tokenizer:
    return byte_level.read(PRETRAINED / "tokenizer.json")


@pytest.fixture(scope="session")
def grammars(tokens: Tokenizer) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokens, VOCAB_SZ, ENDS)
    yield made
    made.close()
