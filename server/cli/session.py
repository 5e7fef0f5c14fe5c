"""`latentd session`: manage the sessions of a running server."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.files import MAX_BLOB_BYTES, read_file, write_file
from server.cli.failure import fail

if TYPE_CHECKING:
    from server.cli.client import Client

app = typer.Typer(help="Manage the sessions of a running server.", no_args_is_help=True)

# Not LATENTD_*: those are server settings, and unknown ones are errors.
UrlOption = Annotated[
    str, typer.Option(envvar="LATENT_URL", help="URL of the server, or unix:PATH.")
]
KeyOption = Annotated[
    str,
    typer.Option(envvar="LATENT_KEY", help="API key.", show_default=False),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="Session id.")]
TurnOption = Annotated[int | None, typer.Option(help="Turn with a checkpoint; default: the last.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
LOCAL = "http://127.0.0.1:8000"


@app.command("list")
def list_sessions(
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number to list; default: all.")
    ] = None,
    as_json: Json = False,
    url: UrlOption = LOCAL,
    key: KeyOption = "",
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
def show(
    session_id: Id, as_json: Json = False, url: UrlOption = LOCAL, key: KeyOption = ""
) -> None:
    """Show one session."""
    from server.cli.tables import print_session

    with _connect(url, key) as client:
        session = client.session(session_id)
    if as_json:
        print(session.model_dump_json())
    else:
        print_session(session)


@app.command()
def turns(
    session_id: Id, as_json: Json = False, url: UrlOption = LOCAL, key: KeyOption = ""
) -> None:
    """List the session's checkpoints: the turns to export, fork or rewind to."""
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
    turn: TurnOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file, - for stdout; default: ID-TURN.safetensors."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    url: UrlOption = LOCAL,
    key: KeyOption = "",
) -> None:
    """Write a session's state to a file."""
    to_stdout = out == Path("-")
    if to_stdout and sys.stdout.isatty():
        raise fail("refusing to write a binary state to a terminal; redirect it or use --out")
    with _connect(url, key) as client:
        exported = client.export(session_id, turn)
    if to_stdout:
        sys.stdout.buffer.write(exported.blob)
        sys.stdout.flush()
        return
    file = out or Path(f"{session_id}-{exported.turn}.safetensors")
    if file.exists() and not force:
        raise fail(f"{file} already exists; use --force to overwrite it")
    try:
        write_file(file, exported.blob)
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from error
    print(file)


@app.command("import")
def import_state(
    file: Annotated[
        Path,
        typer.Argument(help="Exported state, - for stdin, or a tuned initial state as a .pth."),
    ],
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds without use until it expires.")] = None,
    url: UrlOption = LOCAL,
    key: KeyOption = "",
) -> None:
    """Create a session from an exported state, or from a tuned initial one, and print its id."""
    facts = {}
    for item in metadata or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise fail(f"--metadata: {item!r} is not KEY=VALUE")
        facts[name] = value
    blob = _read_state(file)
    with _connect(url, key) as client:
        print(client.import_state(blob, facts, ttl).id)


@app.command()
def fork(
    session_id: Id, turn: TurnOption = None, url: UrlOption = LOCAL, key: KeyOption = ""
) -> None:
    """Create a copy of a session, as of its last turn or an earlier one, and print its id."""
    with _connect(url, key) as client:
        print(client.fork(session_id, turn).id)


@app.command()
def rewind(
    session_id: Id,
    turn: Annotated[int, typer.Argument(help="Turn to go back to; 0 is the beginning.")],
    url: UrlOption = LOCAL,
    key: KeyOption = "",
) -> None:
    """Go back to an earlier turn. Later turns are erased; fork first to keep them."""
    with _connect(url, key) as client:
        session = client.rewind(session_id, turn)
    print(f"{session.id}: turn {session.turn}, {session.tokens} tokens")


@app.command()
def delete(
    session_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Session ids.")],
    url: UrlOption = LOCAL,
    key: KeyOption = "",
) -> None:
    """Erase sessions with their checkpoints, and print the ids of those erased.

    If the server rejects one, the others are still erased.
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


def _read_state(file: Path) -> bytes:
    """A file of tensors as safetensors, which alone a server reads, or what the file has."""
    try:
        if file == Path("-"):
            return sys.stdin.buffer.read()
        return _pack(file) if file.suffix == ".pth" else read_file(file, MAX_BLOB_BYTES)
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from error


def _pack(file: Path) -> bytes:
    from model.network import CheckpointError
    from model.weights import pack_tensors

    try:
        return pack_tensors(file)
    except CheckpointError as error:
        raise fail(error) from error


@contextmanager
def _connect(url: str, key: str) -> Iterator["Client"]:
    """A client of this server. Its errors end the command."""
    from server.cli.client import Client, ClientError

    try:
        with Client(url, key) as client:
            yield client
    except ClientError as error:
        raise fail(error) from error
