"""The command line in the test's process, called as by a user."""

import logging

from typer.testing import CliRunner, Result

from server.__main__ import app


def latentd(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
    """Unexpected exceptions of a command fail the test."""
    before = logging.root.handlers[:], logging.root.level
    env = {"LATENT_URL": None, "LATENT_KEY": None, "COLUMNS": None, "NO_COLOR": "1", **environment}
    try:
        return CliRunner(env=env).invoke(app, [*map(str, arguments)], stdin, catch_exceptions=False)
    finally:  # `serve` logs to the command's stderr, which is closed now
        logging.root.handlers[:], logging.root.level = before


def stdout_of(*arguments: object, stdin: bytes = b"", **environment: str) -> str:
    """Output of a successful command."""
    done = latentd(*arguments, stdin=stdin, **environment)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def refused(*arguments: object, stdin: bytes = b"", **environment: str) -> str:
    """The one line printed by a command that fails."""
    done = latentd(*arguments, stdin=stdin, **environment)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("latentd: ")
    return done.stderr
