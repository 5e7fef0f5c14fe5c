"""The command line of chaos."""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from loadtest import options
from loadtest.chaos.kill import run
from loadtest.chaos.tally import PROBLEMS, Tally, report
from loadtest.results import write_result
from model import PRETRAINED


def chaos(
    kills: Annotated[int, typer.Option(min=0, help="Number of kills.")] = 200,
    servers: Annotated[
        int, typer.Option(min=1, help="Concurrent servers, each with its own data folder.")
    ] = 4,
    clients: Annotated[
        int,
        typer.Option(min=1, help="Clients per server, each with its own sessions and responses."),
    ] = 16,
    left: Annotated[
        int,
        typer.Option(min=0, help="Clients per server that disconnect in the middle of streams."),
    ] = 8,
    slow: Annotated[int, typer.Option(min=0, help="Clients per server that read slowly.")] = 2,
    checkpoint: options.Checkpoint = PRETRAINED,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Kill latentd servers with kill -9 under load, with disconnects and slow readers.

    Every acknowledged turn must be there after the restart, no other one, and bit for bit as of a
    server that nobody killed. Ends with status 1 if anything was not as it must be. Ctrl-C ends it
    early and reports what was seen.
    """
    tally, is_whole = Tally(), True
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(
                run(
                    *(checkpoint, Path(folder)),
                    kills=kills,
                    servers=servers,
                    clients=clients,
                    left=left,
                    slow=slow,
                    seed=seed,
                    tally=tally,
                )
            )
        except KeyboardInterrupt:
            is_whole = False
            print("interrupted: the files of the stores were not checked at the end")
    report(tally)
    if out is not None:
        counts = {kind: tally.count(kind) for kind in PROBLEMS}
        write_result(out, {"whole": is_whole, "problems by kind": counts, "tally": vars(tally)})
    if tally.problems:
        raise typer.Exit(1)
