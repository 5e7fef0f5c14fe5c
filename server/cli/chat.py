"""`latentd chat`: talk with a running server, in a session that it keeps."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.files import write_file
from server.cli.client import Client, ClientError
from server.cli.dialogue import Dialogue, speeds
from server.cli.tables import print_facts, print_session, print_sessions
from server.cli.terminal import Terminal

NUM_LISTED = 20


@dataclass(frozen=True)
class Options:
    """How to talk."""

    url: str
    key: str
    session_id: str | None
    system: str | None
    raw: bool
    sampling: Mapping[str, float]
    """Parameters of every request."""


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does."""

    run: Callable[[str], None]
    """Takes what follows the name."""

    argument: str
    """What may follow; empty: nothing."""

    help: str


class CommandError(Exception):
    """A command is not one, or cannot do its work."""


def chat(options: Options) -> int:
    """Talk until the input ends. Returns the exit status.

    1 if there is no session to begin with, or a line of a pipe fails, which ends the chat: the
    next ones may need what it did.
    """
    terminal = Terminal()
    try:
        with Client(options.url, options.key) as client:
            if options.session_id is None:
                session = client.create()
            else:
                session = client.session(options.session_id)
            dialogue = Dialogue(client, terminal, session, options.sampling, raw=options.raw)
            dialogue.system = options.system
            where = f"at turn {session.turn}, with {session.tokens:,} tokens"
            terminal.remark(f"session {session.id}: {where if session.turn else 'new'}")
            if options.system is not None and session.turn:
                terminal.remark("the session has begun: the system text is not sent")
            ok = Chat(client, terminal, dialogue).run()
            terminal.remark(f"to go on: {_resuming(options.url, dialogue)}")
            return 0 if ok else 1
    except ClientError as error:
        terminal.error(error)
        return 1


class Chat:
    """Lines, each a message or a command."""

    def __init__(self, client: Client, terminal: Terminal, dialogue: Dialogue) -> None:
        self._client = client
        self._terminal = terminal
        self._dialogue = dialogue
        self._quits = False
        self._commands = {
            "sessions": Command(self._list, "", "list your newest sessions"),
            "new": Command(self._new, "", "begin a new session"),
            "switch": Command(self._switch, "ID", "go on with another session"),
            "fork": Command(self._fork, "[TURN]", "go on in a copy of the session, as it was then"),
            "rewind": Command(self._rewind, "[TURN]", "go back a turn, or to this one"),
            "export": Command(self._export, "[FILE]", "write the session's state to a file"),
            "stats": Command(
                self._stats, "", "what the session is, and how fast the last turn was"
            ),
            "system": Command(self._system, "[TEXT]", "what new sessions begin with"),
            "help": Command(self._help, "", "this list"),
            "quit": Command(self._quit, "", "end; so does Ctrl-D"),
        }

    def run(self) -> bool:
        """To the end of the input. False if a line of a pipe failed."""
        if self._terminal.is_interactive:
            self._terminal.remark("/help lists the commands; Ctrl-C stops an answer")
        while not self._quits:
            try:
                line = self._terminal.read()
            except KeyboardInterrupt:
                line = None
            if line is None:
                self._terminal.leave()
                return True
            if line.strip() and not self._take(line) and not self._terminal.is_interactive:
                return False
        return True

    def _take(self, line: str) -> bool:
        """Whether it could be done."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
                return True
            return self._dialogue.say(line[1:] if line.startswith("//") else line)
        except (ClientError, CommandError) as error:
            self._terminal.error(error)
        except KeyboardInterrupt:
            self._terminal.remark("stopped")
        return False

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        command = self._commands.get(name.strip())
        if command is None:
            known = ", ".join(f"/{name}" for name in self._commands)
            raise CommandError(
                f"there is no /{name}, but {known}; // at the beginning of a line sends a slash"
            )
        if argument and not command.argument:
            raise CommandError(f"/{name} stands alone")
        command.run(argument)

    def _list(self, _: str) -> None:
        print_sessions(self._client.sessions(NUM_LISTED))

    def _new(self, _: str) -> None:
        self._dialogue.go_on(self._client.create())
        self._terminal.write(f"{self._dialogue.session_id}\n")

    def _switch(self, session_id: str) -> None:
        if not session_id:
            raise CommandError("/switch needs the ID of a session; /sessions lists them")
        session = self._client.session(session_id)
        self._dialogue.go_on(session)
        self._terminal.write(f"{session.id}: turn {session.turn}, {session.tokens:,} tokens\n")

    def _fork(self, argument: str) -> None:
        turn = _turn(argument) if argument else None
        self._dialogue.go_on(self._client.fork(self._dialogue.session_id, turn))
        self._terminal.write(f"{self._dialogue.session_id}\n")

    def _rewind(self, argument: str) -> None:
        turn = _turn(argument) if argument else self._dialogue.session().turn - 1
        if turn < 0:
            raise CommandError("the session is at its beginning")
        session = self._client.rewind(self._dialogue.session_id, turn)
        self._dialogue.go_on(session)
        self._terminal.write(f"{session.id}: turn {session.turn}, {session.tokens:,} tokens\n")

    def _export(self, argument: str) -> None:
        exported = self._client.export(self._dialogue.session_id, None)
        # The id is the server's word: it must not lead to another folder.
        name = Path(f"{self._dialogue.session_id}-{exported.turn}.safetensors").name
        file = Path(argument or name)
        if file.exists():
            raise CommandError(f"{file}: exists")
        try:
            write_file(file, exported.blob)
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror}") from error
        print(file)

    def _stats(self, _: str) -> None:
        print_session(self._dialogue.session())
        if self._dialogue.last is not None and (facts := speeds(self._dialogue.last)):
            print_facts(facts)

    def _system(self, text: str) -> None:
        if text:
            self._dialogue.system = text
        print(self._dialogue.system or "new sessions begin with no system text")

    def _help(self, _: str) -> None:
        for name, command in self._commands.items():
            print(f"{f'/{name} {command.argument}':18}{command.help}")
        print("A line that ends in a backslash goes on in the next; // sends a slash.")

    def _quit(self, _: str) -> None:
        self._quits = True


def _turn(argument: str) -> int:
    if not (argument.isascii() and argument.isdecimal()):
        raise CommandError(f"{argument} is not the number of a turn")
    return int(argument)


def _resuming(url: str, dialogue: Dialogue) -> str:
    """The command that goes on with the session."""
    parts = ["latentd", "chat", "--session", dialogue.session_id]
    if url != os.environ.get("LATENT_URL"):
        parts += ["--url", url]
    return shlex.join(parts + ["--raw"] * dialogue.raw)
