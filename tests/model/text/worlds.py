"""A World vocabulary of few tokens."""

from model.text.world import WorldTokenizer

SINGLE = {1 + byte: bytes([byte]) for byte in range(256)}
TEXTS = ("th", "the ", "\n\n", "User", "User:", "Assistant", "System", " cat", " <", "think")
LONGER = (*(text.encode() for text in TEXTS), "é".encode(), "日本".encode(), b"\x97\xa5", b"\xa9a")
TOKENS = SINGLE | {257 + i: token for i, token in enumerate((*LONGER, b"  ", b"    ", b">\n"))}
WORDS = WorldTokenizer(TOKENS)
