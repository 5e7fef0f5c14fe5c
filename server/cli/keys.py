"""`latentd keys`: manage a server's API keys."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from server.cli.failure import fail
from server.keys import Key, KeyFileError, Limits, add_key, key_id_of, read_keys, revoke_key

app = typer.Typer(
    help="Create, list, revoke and erase the API keys of a server.", no_args_is_help=True
)

KeyFileOption = Annotated[
    Path,
    typer.Option(
        "--file", envvar="LATENTD_KEY_FILE", help="The key file, as for latentd serve --key-file."
    ),
]
DATA_DIR = platformdirs.user_data_path("latentd")
DataDir = Annotated[
    Path,
    typer.Option(
        envvar="LATENTD_DATA_DIR", help="Folder of the session store, as for latentd serve."
    ),
]
CountOption = Annotated[int | None, typer.Option(min=1, help="Default: the server's setting.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    file: KeyFileOption,
    requests_per_minute: CountOption = None,
    tokens_per_minute: CountOption = None,
    concurrent_requests: CountOption = None,
    concurrent_sequences: CountOption = None,
) -> None:
    """Create a key and print it. It is shown only once: the file stores its hash."""
    limits = Limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        concurrent_sequences=concurrent_sequences,
    )
    with _or_fail():
        key, secret = add_key(file, name, limits)
    print(f"{key.name} is {key.id}; its secret is not shown again:", file=sys.stderr)
    print(secret)


@app.command("list")
def list_keys(file: KeyFileOption) -> None:
    """List the keys, oldest first."""
    from server.cli.tables import print_keys

    with _or_fail():
        keys = read_keys(file)
    print_keys(keys)


@app.command()
def revoke(
    name_or_id: Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="Name or id of the key.")],
    file: KeyFileOption,
) -> None:
    """Revoke a key. A running server rejects it within two seconds.

    Its sessions stay in the store until they expire.
    """
    with _or_fail():
        key: Key = revoke_key(file, name_or_id)
    print(f"{key.name} {key.id}")


@app.command()
def erase(
    name_or_id: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_ID", help="Name or id of the key; the id if it was revoked."
        ),
    ],
    file: KeyFileOption,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Erase all data of a key: sessions and stored responses, in memory and on disk.

    A running server ends the key's requests first. The key itself remains valid: to disable it,
    revoke it first.
    """
    from server.sessions.sqlite.erasing import EraseError
    from server.sessions.sqlite.erasing import erase as run

    with _or_fail():
        key_id = key_id_of(file, name_or_id)
    try:
        print(f"erased {run(data_dir, key_id)}")
    except EraseError as error:
        raise fail(error) from error


@contextmanager
def _or_fail() -> Iterator[None]:
    try:
        yield
    except KeyFileError as error:
        raise fail(error) from error
