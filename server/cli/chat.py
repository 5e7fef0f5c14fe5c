"""`latentd chat`: an interactive chat in a session of a running server."""

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
    """Options of `latentd chat`."""

    url: str
    key: str
    session_id: str | None
    system: str | None
    raw: bool
    sampling: Mapping[str, float]
    """Sampling parameters sent with every request."""


@dataclass(frozen=True)
class Command:
    """A slash command."""

    run: Callable[[str], None]
    """Called with the text after the name."""

    argument: str
    """Placeholder of the argument; empty if there is none."""

    help: str


class CommandError(Exception):
    """The command is unknown or failed."""


def chat(options: Options) -> int:
    """Chat until the input ends. Returns the exit status.

    It is 1 if the session cannot be opened, or if a line from a pipe fails, which ends the chat:
    later lines may depend on it.
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
                terminal.remark("the session has already begun: the system message is not sent")
            ok = Chat(client, terminal, dialogue).run()
            terminal.remark(f"to continue: {_resume_command(options.url, dialogue)}")
            return 0 if ok else 1
    except ClientError as error:
        terminal.error(error)
        return 1


class Chat:
    """The input loop: each line is a message or a command."""

    def __init__(self, client: Client, terminal: Terminal, dialogue: Dialogue) -> None:
        self._client = client
        self._terminal = terminal
        self._dialogue = dialogue
        self._is_done = False
        self._commands = {
            "sessions": Command(self._list, "", "list your newest sessions"),
            "new": Command(self._new, "", "start a new session"),
            "switch": Command(self._switch, "ID", "switch to another session"),
            "fork": Command(self._fork, "[TURN]", "continue in a copy of the session"),
            "rewind": Command(self._rewind, "[TURN]", "go back one turn, or to this turn"),
            "export": Command(self._export, "[FILE]", "write the session's state to a file"),
            "stats": Command(self._stats, "", "show the session and the speed of the last turn"),
            "system": Command(self._system, "[TEXT]", "set the system message of new sessions"),
            "help": Command(self._help, "", "show this list"),
            "quit": Command(self._quit, "", "exit; so does Ctrl-D"),
        }

    def run(self) -> bool:
        """Process lines until the input ends. False if a line from a pipe failed."""
        if self._terminal.is_interactive:
            self._terminal.remark("/help lists the commands; Ctrl-C stops an answer")
        while not self._is_done:
            try:
                line = self._terminal.read()
            except KeyboardInterrupt:
                line = None
            if line is None:
                self._terminal.leave()
                return True
            if line.strip() and not self._handle(line) and not self._terminal.is_interactive:
                return False
        return True

    def _handle(self, line: str) -> bool:
        """Whether the line succeeded."""
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
                f"unknown command /{name}: use {known}; start a line with // to send a slash"
            )
        if argument and not command.argument:
            raise CommandError(f"/{name} takes no argument")
        command.run(argument)

    def _list(self, _: str) -> None:
        print_sessions(self._client.sessions(NUM_LISTED))

    def _new(self, _: str) -> None:
        self._dialogue.switch_to(self._client.create())
        self._terminal.write(f"{self._dialogue.session_id}\n")

    def _switch(self, session_id: str) -> None:
        if not session_id:
            raise CommandError("/switch needs a session ID; /sessions lists them")
        session = self._client.session(session_id)
        self._dialogue.switch_to(session)
        self._terminal.write(f"{session.id}: turn {session.turn}, {session.tokens:,} tokens\n")

    def _fork(self, argument: str) -> None:
        turn = _turn(argument) if argument else None
        self._dialogue.switch_to(self._client.fork(self._dialogue.session_id, turn))
        self._terminal.write(f"{self._dialogue.session_id}\n")

    def _rewind(self, argument: str) -> None:
        turn = _turn(argument) if argument else self._dialogue.session().turn - 1
        if turn < 0:
            raise CommandError("the session is at its first turn")
        session = self._client.rewind(self._dialogue.session_id, turn)
        self._dialogue.switch_to(session)
        self._terminal.write(f"{session.id}: turn {session.turn}, {session.tokens:,} tokens\n")

    def _export(self, argument: str) -> None:
        exported = self._client.export(self._dialogue.session_id, None)
        # The id comes from the server: it must not name another folder.
        name = Path(f"{self._dialogue.session_id}-{exported.turn}.safetensors").name
        file = Path(argument or name)
        if file.exists():
            raise CommandError(f"{file} already exists")
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
        print(self._dialogue.system or "new sessions have no system message")

    def _help(self, _: str) -> None:
        for name, command in self._commands.items():
            print(f"{f'/{name} {command.argument}':18}{command.help}")
        print("A line ending in a backslash continues on the next; // sends a slash.")

    def _quit(self, _: str) -> None:
        self._is_done = True


def _turn(argument: str) -> int:
    if not (argument.isascii() and argument.isdecimal()):
        raise CommandError(f"{argument} is not a turn number")
    return int(argument)


def _resume_command(url: str, dialogue: Dialogue) -> str:
    """The command that continues the session."""
    parts = ["latentd", "chat", "--session", dialogue.session_id]
    if url != os.environ.get("LATENT_URL"):
        parts += ["--url", url]
    return shlex.join(parts + ["--raw"] * dialogue.raw)
