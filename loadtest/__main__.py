"""Load tests for servers with OpenAI's API, and verification of latentd's guarantees."""

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType

import typer

from loadtest import (
    bench_commits,
    bench_drift,
    bench_freeze,
    bench_front,
    bench_host,
    bench_http,
    bench_llama,
    bench_mixed,
    bench_model,
    bench_neighbour,
    bench_precision,
    bench_products,
    bench_worst,
)
from loadtest.bench import bench
from loadtest.capacity import capacity
from loadtest.chaos.command import chaos
from loadtest.compare import compare
from loadtest.compare_kv import compare_kv
from loadtest.long_session import long_session
from loadtest.many_sessions import many_sessions
from loadtest.paper import paper
from loadtest.results import heading
from loadtest.soak import soak

Command = Callable[..., None]

ANY_SERVER: tuple[Command, ...] = (bench, capacity, compare)
PROMISES: tuple[Command, ...] = (long_session, many_sessions, chaos, soak, compare_kv, paper)
PARTS: dict[str, ModuleType] = {
    "model": bench_model,
    "products": bench_products,
    "drift": bench_drift,
    "precision": bench_precision,
    "mixed": bench_mixed,
    "http": bench_http,
    "front": bench_front,
    "host": bench_host,
    "commits": bench_commits,
    "freeze": bench_freeze,
    "neighbour": bench_neighbour,
    "worst": bench_worst,
}

ABOUT = "Measure any server of OpenAI's API, and prove what latentd promises."

app = typer.Typer(no_args_is_help=True, add_completion=False, help=ABOUT)


def headed(command: Command) -> Command:
    """The command, after a line that says what was called and where: its output is the record."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        typer.echo(heading())
        command(*args, **kwargs)

    return run


for each in ANY_SERVER:
    app.command(rich_help_panel="Any server of OpenAI's API")(each)
for each in PROMISES:
    app.command(rich_help_panel="What latentd promises")(each)
for name, module in PARTS.items():
    about, *_ = (module.__doc__ or "").split("\n\n")
    app.command(name, help=about, rich_help_panel="Parts of latentd")(headed(module.main))
app.add_typer(bench_llama.app, name="llama", rich_help_panel="Any server of OpenAI's API")


def main() -> None:
    """Run a command. User errors end with one line."""
    try:
        app()
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
