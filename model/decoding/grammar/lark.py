"""Building blocks of llguidance's Lark."""

import json


def quoted(text: str) -> str:
    """A Lark string: JSON's syntax, but for one character that JSON does not escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
