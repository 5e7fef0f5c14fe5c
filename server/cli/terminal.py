"""Lines from a person or a pipe; text, and remarks about it, back."""

import importlib
import io
import os
import sys
from contextlib import suppress

PROMPT, MORE = "> ", ". "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
ORDERS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, with which a text could give the terminal orders."""


class Terminal:
    """Standard input and output. Remarks and errors go to stderr, so that a pipe has only text.

    Editing of lines, and the history of those typed in this process, are the readline module's,
    where there is one.
    """

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._edits = self.is_interactive and sys.stdout.isatty()
        self._dims = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._is_in_line = False
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self._edits:
            with suppress(ImportError):
                importlib.import_module("readline")

    def read(self) -> str | None:
        """The next line, None at the end. One that ends in a backslash goes on in the next."""
        parts = list[str]()
        while (line := self._read_line(MORE if parts else PROMPT)) is not None:
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(parts) if parts else None

    def leave(self) -> None:
        """The input has ended: what comes next is not to stand behind the prompt."""
        if self.is_interactive:
            print(file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Text from elsewhere, as it comes, without orders to the terminal."""
        shown = text.translate(ORDERS)
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._is_in_line = not shown.endswith("\n")

    def end_line(self) -> None:
        """What comes next begins a line."""
        if self._is_in_line:
            self.write("\n")

    def remark(self, text: str) -> None:
        """A line about the chat."""
        line = text.translate(ORDERS)
        self._tell(f"{DIM}{line}{PLAIN}" if self._dims else line)

    def error(self, error: Exception) -> None:
        """A line about what went wrong."""
        self._tell(f"latentd: {error}".translate(ORDERS))

    def _tell(self, line: str) -> None:
        self.end_line()
        print(line, file=sys.stderr, flush=True)

    def _read_line(self, prompt: str) -> str | None:
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.is_interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
