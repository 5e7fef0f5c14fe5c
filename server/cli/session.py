"""`latentd session`: the sessions of a running server."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.files import write_file
from server.cli.failure import fail

if TYPE_CHECKING:
    from server.cli.client import Client

app = typer.Typer(help="Look after the sessions of a running server.", no_args_is_help=True)

# LATENTD_* are the server's own settings, of which it accepts no unknown one.
Url = Annotated[str, typer.Option(envvar="LATENT_URL", help="Address of the server, or unix:PATH.")]
Key = Annotated[
    str,
    typer.Option(envvar="LATENT_KEY", help="API key to show.", show_default=False),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The session.")]
Turn = Annotated[
    int | None, typer.Option(help="A turn whose state is kept; the last if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
LOCAL = "http://127.0.0.1:8000"


@app.command("list")
def list_sessions(
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most to list; all if not given.")
    ] = None,
    as_json: Json = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """List your sessions, newest first."""
    from server.cli.tables import print_sessions

    with _connect(url, key) as client:
        sessions = client.sessions(limit)
        if not as_json:
            print_sessions(sessions)
            return
        for session in sessions:
            print(session.model_dump_json())


@app.command()
def show(session_id: Id, as_json: Json = False, url: Url = LOCAL, key: Key = "") -> None:
    """Show one session."""
    from server.cli.tables import print_session

    with _connect(url, key) as client:
        session = client.session(session_id)
    if as_json:
        print(session.model_dump_json())
    else:
        print_session(session)


@app.command()
def turns(session_id: Id, as_json: Json = False, url: Url = LOCAL, key: Key = "") -> None:
    """List the turns whose states are kept: to export, to fork or to rewind to."""
    from server.cli.tables import print_turns

    with _connect(url, key) as client:
        kept = client.turns(session_id)
    if not as_json:
        print_turns(kept)
        return
    for turn in kept:
        print(turn.model_dump_json())


@app.command()
def export(
    session_id: Id,
    turn: Turn = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, - for stdout; ID-TURN.safetensors if not given."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Write a session's state to a file."""
    to_stdout = out == Path("-")
    if to_stdout and sys.stdout.isatty():
        raise fail("a state is not for a terminal; redirect it or name a file with --out")
    with _connect(url, key) as client:
        exported = client.export(session_id, turn)
    if to_stdout:
        sys.stdout.buffer.write(exported.blob)
        sys.stdout.flush()
        return
    file = out or Path(f"{session_id}-{exported.turn}.safetensors")
    if file.exists() and not force:
        raise fail(f"{file}: exists; --force overwrites it")
    try:
        write_file(file, exported.blob)
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from error
    print(file)


@app.command("import")
def import_state(
    file: Annotated[Path, typer.Argument(help="Exported state, - for stdin.")],
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given several times.")
    ] = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds without use that it may live.")] = None,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Make a session from an exported state and print its id."""
    facts = {}
    for item in metadata or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise fail(f"--metadata: {item!r} is not KEY=VALUE")
        facts[name] = value
    try:
        blob = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from error
    with _connect(url, key) as client:
        print(client.import_state(blob, facts, ttl).id)


@app.command()
def fork(session_id: Id, turn: Turn = None, url: Url = LOCAL, key: Key = "") -> None:
    """Make a session that begins where this one is, or was, and print its id."""
    with _connect(url, key) as client:
        print(client.fork(session_id, turn).id)


@app.command()
def rewind(
    session_id: Id,
    turn: Annotated[int, typer.Argument(help="The turn to go back to; 0 is the beginning.")],
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Go back to an earlier turn. Later turns are erased; fork first to keep them."""
    with _connect(url, key) as client:
        session = client.rewind(session_id, turn)
    print(f"{session.id}: turn {session.turn}, {session.tokens} tokens")


@app.command()
def delete(
    session_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The sessions.")],
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Erase sessions with their checkpoints, and print the ids of those that are gone.

    One that the server refuses to erase does not keep the others.
    """
    from server.cli.client import RefusedError

    failure = None
    with _connect(url, key) as client:
        for session_id in session_ids:
            try:
                client.delete(session_id)
                print(session_id)
            except RefusedError as error:
                failure = fail(error)
    if failure is not None:
        raise failure


@contextmanager
def _connect(url: str, key: str) -> Iterator["Client"]:
    """A client of this server; with what it raises the command fails."""
    from server.cli.client import Client, ClientError

    try:
        with Client(url, key) as client:
            yield client
    except ClientError as error:
        raise fail(error) from error
