"""Load tests for servers with OpenAI's API, and verification of latentd's guarantees."""

import sys

import typer

from loadtest.bench import bench
from loadtest.capacity import capacity
from loadtest.chaos.command import chaos
from loadtest.compare import compare
from loadtest.compare_kv import compare_kv
from loadtest.long_session import long_session
from loadtest.many_sessions import many_sessions
from loadtest.paper import paper
from loadtest.rwkv7 import rwkv7
from loadtest.soak import soak

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
for command in (
    bench,
    capacity,
    compare,
    long_session,
    many_sessions,
    chaos,
    soak,
    compare_kv,
    paper,
    rwkv7,
):
    app.command()(command)


def main() -> None:
    """Run a command. User errors end with one line."""
    try:
        app()
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
