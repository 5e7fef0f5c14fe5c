"""Exit of a command that failed."""

import sys

import typer


def fail(message: object) -> typer.Exit:
    """Print one line to stderr. Returns the exit to raise."""
    print(f"latentd: {message}", file=sys.stderr)
    return typer.Exit(2)
