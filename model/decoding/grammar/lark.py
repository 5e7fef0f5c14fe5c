"""Pieces of the library's dialect of Lark."""

import json


def quoted(text: str) -> str:
    """A string of Lark, which JSON's are but for one character that JSON does not escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
