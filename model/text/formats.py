"""Tokenizer formats."""

from model.text.byte_level import ByteLevelTokenizer
from model.text.tokenizer import Tokenizer
from model.text.world import WorldTokenizer


def from_json(text: str) -> Tokenizer:
    """Restore a tokenizer from its `to_json`. Raises TokenizerError."""
    if WorldTokenizer.is_json(text):
        return WorldTokenizer.from_json(text)
    return ByteLevelTokenizer.from_json(text)
