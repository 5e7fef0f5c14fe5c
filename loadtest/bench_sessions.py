"""What sessions cost: commits, forks and rewinds, and many of them on one server.

    python -m loadtest.bench_sessions [--part commits] [--part forks] [--part many]

Each part starts `latentd serve` on a free port of the loopback and a data folder of its own.

commits   p50 and p99 of making a turn durable, one session alone and 32 that finish together, and
          what the disk takes for the same bytes
forks     forking and rewinding a session with a short history and one of a million tokens
many      memory, disk, and times to create and to resume, from 100 sessions to 10,000
"""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loadtest.bench_commits import print_commits
from loadtest.bench_forks import print_forks
from loadtest.bench_many import counts_up_to, print_many
from model import PRETRAINED


class Part(StrEnum):
    COMMITS = "commits"
    FORKS = "forks"
    MANY = "many"


def main(
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; all if none.")] = None,
    turns: Annotated[int, typer.Option(help="commits: turns of one session alone.")] = 300,
    together: Annotated[int, typer.Option(help="commits: sessions that finish together.")] = 32,
    commit_rounds: Annotated[int, typer.Option(help="commits: how often they do.")] = 50,
    short: Annotated[int, typer.Option(help="forks: tokens of the short history.")] = 100,
    long: Annotated[int, typer.Option(help="forks: tokens of the long history.")] = 1_000_000,
    fork_rounds: Annotated[int, typer.Option(help="forks: forks of each.")] = 50,
    sessions: Annotated[int, typer.Option(help="many: how many in the end.")] = 10_000,
    checkpoint: Annotated[Path, typer.Option(help="Folder of the model.")] = PRETRAINED,
) -> None:
    """Measure and print."""
    for one in part or list(Part):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            match one:
                case Part.COMMITS:
                    print_commits(
                        checkpoint, folder, turns=turns, together=together, rounds=commit_rounds
                    )
                case Part.FORKS:
                    print_forks(checkpoint, folder, short=short, long=long, rounds=fork_rounds)
                case Part.MANY:
                    print_many(checkpoint, folder, list(counts_up_to(sessions)))


if __name__ == "__main__":
    typer.run(main)
