"""Errors in grammar sources, as one line."""

import re

MESSAGE_CHARACTERS = 200
"""Limits how much of a rejected source its error message repeats."""

_HINT = re.compile(r"\. (Enable|If you) .*|\s*<non-verbose/>|\s*<backtrace>.*", re.DOTALL)


class GrammarError(ValueError):
    """The source is not usable; the message is one line."""


class GrammarBusyError(Exception):
    """The compiler is busy with other sources; this one was not compiled in time."""


def one_line(message: str) -> str:
    """The library's message without hints and context, shortened."""
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
