"""The command line in the process of the test, as a user would call it."""

import logging

from typer.testing import CliRunner, Result

from server.__main__ import app


def latentd(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
    """Exceptions that no command should let through fail the test."""
    before = logging.root.handlers[:], logging.root.level
    env = {"LATENT_URL": None, "LATENT_KEY": None, "COLUMNS": None, "NO_COLOR": "1", **environment}
    try:
        return CliRunner(env=env).invoke(app, [*map(str, arguments)], stdin, catch_exceptions=False)
    finally:  # `serve` logs to the command's stderr, which is closed now
        logging.root.handlers[:], logging.root.level = before


def stdout_of(*arguments: object, stdin: bytes = b"", **environment: str) -> str:
    """What a command prints that does its work."""
    done = latentd(*arguments, stdin=stdin, **environment)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def refused(*arguments: object, stdin: bytes = b"", **environment: str) -> str:
    """The one line that a refusal prints."""
    done = latentd(*arguments, stdin=stdin, **environment)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("latentd: ")
    return done.stderr
