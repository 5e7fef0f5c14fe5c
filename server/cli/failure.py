"""How a command that cannot do its work ends."""

import sys

import typer


def fail(message: object) -> typer.Exit:
    """One line on stderr, and the exit that goes with it."""
    print(f"latentd: {message}", file=sys.stderr)
    return typer.Exit(2)
