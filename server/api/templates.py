"""Events that differ only in their text: serialized once, then only the text is inserted.

Building and serializing a model costs several times as much as sending it, for every token.
"""

import secrets
from collections.abc import Callable

from pydantic import BaseModel
from pydantic_core import to_json


class TextTemplate:
    """A message's JSON with a placeholder for one text. `render` equals the serialized model."""

    def __init__(self, make: Callable[[str], BaseModel]) -> None:
        """`make` builds the message for a text, which must appear once and change nothing else."""
        text = secrets.token_hex(16)  # unique in the message
        written = make(text).model_dump_json(exclude_unset=True).encode()
        self._before, self._after = written.split(to_json(text))

    def render(self, text: str) -> bytes:
        """The message with this text, as JSON on one line."""
        return self._before + to_json(text) + self._after
