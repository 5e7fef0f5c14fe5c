"""Events that differ in nothing but their text: built once, then only the text is put in.

Making a model and writing it out costs several times what sending it does, for every token.
"""

import secrets
from collections.abc import Callable

from pydantic import BaseModel
from pydantic_core import to_json


class TextTemplate:
    """A message's JSON with a place for one text. `render` is what the model itself would give."""

    def __init__(self, make: Callable[[str], BaseModel]) -> None:
        """`make` gives the message with a text, which is in it once and changes nothing else."""
        text = secrets.token_hex(16)  # nothing else in the message is like it
        written = make(text).model_dump_json(exclude_unset=True).encode()
        self._before, self._after = written.split(to_json(text))

    def render(self, text: str) -> bytes:
        """The message with this text, as JSON in one line."""
        return self._before + to_json(text) + self._after
