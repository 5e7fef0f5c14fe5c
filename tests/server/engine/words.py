"""A tokenizer of few words for tests of text."""

from model.text.byte_level import train

WORDS = train(["a banana and an ananas"], 260, ["<|endoftext|>"])


def byte_tokens(text: str) -> list[int]:
    """One token per byte."""
    single = {WORDS.bytes_of(i): i for i in range(257)}
    return [single[bytes([byte])] for byte in text.encode()]


def word_tokens(text: str, kind: str) -> list[int]:
    """Tokens as the tokenizer makes them (`words`), or one per byte (`bytes`)."""
    return WORDS.encode(text) if kind == "words" else byte_tokens(text)
