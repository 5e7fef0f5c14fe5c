"""Terminal or pipe: reads lines, writes text and remarks."""

import importlib
import io
import os
import sys
from contextlib import suppress

PROMPT, MORE = "> ", ". "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROL_CHARACTERS = {
    code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}
"""Control characters, which could control the terminal."""


class Terminal:
    """Standard input and output. Remarks and errors go to stderr, so that stdout has only text.

    Line editing and the history of this process use the readline module, if there is one.
    """

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._edits = self.is_interactive and sys.stdout.isatty()
        self._is_dimmed = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._is_in_line = False
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self._edits:
            with suppress(ImportError):
                importlib.import_module("readline")

    def read(self) -> str | None:
        """The next line, None at the end of input. A trailing backslash continues the line."""
        parts = list[str]()
        while (line := self._read_line(MORE if parts else PROMPT)) is not None:
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(parts) if parts else None

    def leave(self) -> None:
        """Leave the prompt's line when the input has ended."""
        if self.is_interactive:
            print(file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Write text without control characters."""
        shown = text.translate(CONTROL_CHARACTERS)
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._is_in_line = not shown.endswith("\n")

    def end_line(self) -> None:
        """Start a new line unless already at one."""
        if self._is_in_line:
            self.write("\n")

    def remark(self, text: str) -> None:
        """Print a remark on its own line."""
        line = text.translate(CONTROL_CHARACTERS)
        self._print_line(f"{DIM}{line}{PLAIN}" if self._is_dimmed else line)

    def error(self, error: Exception) -> None:
        """Print an error on its own line."""
        self._print_line(f"latentd: {error}".translate(CONTROL_CHARACTERS))

    def _print_line(self, line: str) -> None:
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
