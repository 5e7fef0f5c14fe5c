"""`latentd keys`: manage a server's API keys."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.cli.failure import fail
from server.keys import Key, KeyFileError, Limits, add_key, read_keys, revoke_key

app = typer.Typer(help="Create, list and revoke the API keys of a server.", no_args_is_help=True)

File = Annotated[
    Path,
    typer.Option(
        "--file", envvar="LATENTD_KEY_FILE", help="The key file, as for latentd serve --key-file."
    ),
]
Count = Annotated[int | None, typer.Option(min=1, help="Default: the server's setting.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    file: File,
    requests_per_minute: Count = None,
    tokens_per_minute: Count = None,
    concurrent_requests: Count = None,
) -> None:
    """Create a key and print it. It is shown only once: the file stores its hash."""
    limits = Limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
    )
    with _or_fail():
        key, secret = add_key(file, name, limits)
    print(f"{key.name} is {key.id}; its secret is not shown again:", file=sys.stderr)
    print(secret)


@app.command("list")
def list_keys(file: File) -> None:
    """List the keys, oldest first."""
    from server.cli.tables import print_keys

    with _or_fail():
        keys = read_keys(file)
    print_keys(keys)


@app.command()
def revoke(
    name_or_id: Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="Name or id of the key.")],
    file: File,
) -> None:
    """Revoke a key. A running server rejects it within two seconds.

    Its sessions stay in the store until they expire.
    """
    with _or_fail():
        key: Key = revoke_key(file, name_or_id)
    print(f"{key.name} {key.id}")


@contextmanager
def _or_fail() -> Iterator[None]:
    try:
        yield
    except KeyFileError as error:
        raise fail(error) from error
