"""What is wrong with a source, in one line."""

import re

MESSAGE_CHARACTERS = 200
"""A source that is refused must not come back as its own error message."""

_HINT = re.compile(r"\. (Enable|If you) .*|\s*<non-verbose/>|\s*<backtrace>.*", re.DOTALL)


class GrammarError(ValueError):
    """No text can be made to keep to this source; the message is one line."""


class GrammarBusyError(Exception):
    """Others' sources are being compiled; this one was not looked at in time."""


def one_line(message: str) -> str:
    """The library's message without its hints, its context and its length."""
    message = _HINT.sub("", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return shortened(f"invalid regular expression: {errors[0]}")
    return shortened(lines[0] if lines else "the source cannot be compiled")


def shortened(line: str) -> str:
    if len(line) > MESSAGE_CHARACTERS:
        return line[: MESSAGE_CHARACTERS - 3] + "..."
    return line
