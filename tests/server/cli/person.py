"""Simulates a user of `latentd chat` at a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.patience import PATIENCE_S

START = f"""\
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches whom the terminal controls
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began with `&`
from server.__main__ import main
from server.cli import dialogue
dialogue.SETTLE_S = {PATIENCE_S}
main()
"""
CTRL_C, CTRL_D = "\x03", "\x04"
AGAIN_S = 5.0


class Person:
    """Types, and reads the output."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._unread = ""
        self.all = ""
        """All output so far."""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def read(self, pattern: str, again: str = "") -> re.Match[str]:
        """The output up to this pattern; raises AssertionError if it does not appear.

        Keys may be typed again while there is no output: Python's readline does not notice a Ctrl-C
        between showing the prompt and waiting for keys.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self._unread)):
            patience_s = max(0.0, deadline - time.monotonic())
            if again and patience_s > AGAIN_S:
                ready, _, _ = select.select([self._terminal], [], [], AGAIN_S)
                if not ready:
                    self.type(again)
                    continue
            ready, _, _ = select.select([self._terminal], [], [], patience_s)
            more = bool(ready) and self._take()
            assert more, f"no {pattern!r} in {self.all!r}"
        self._unread = self._unread[found.end() :]
        return found

    def leave(self) -> int:
        """The exit status, once the process has ended."""
        while self._take():
            pass
        return self.process.wait(PATIENCE_S)

    def _take(self) -> bool:
        """Whether there may be more output: a terminal that is no longer open gives an error, or
        nothing."""
        try:
            text = os.read(self._terminal, 65536).decode(errors="replace")
        except OSError:
            return False
        self._unread += text
        self.all += text
        return bool(text)


@contextmanager
def person(url: str, *arguments: object) -> Iterator[Person]:
    """A user of `latentd chat` with the server at `url`."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LATENT")}
    process = subprocess.Popen(
        [sys.executable, "-c", START, "chat", "--url", url, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=kept | {"TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(theirs)
    try:
        yield Person(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
