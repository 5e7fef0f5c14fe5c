"""Time to first token of a session that a restarted server resumes, by the length of its history.

    python -m loadtest.bench_resume [--long 1000000]

Starts `latentd serve` on a free port of the loopback and a data folder of its own. Each round
starts the server anew and times every session's first token; the order alternates. A long history
of a million tokens takes some minutes to read.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from model import PRETRAINED
from tests.server.processes import server_process

MOST_AT_ONCE = 100_000
"""Tokens of one request while a history is read."""


def read_history(client: httpx.Client, session_id: str, num_tokens: int) -> None:
    """Grow a session to this many tokens."""
    chance = random.Random(num_tokens)
    while num_tokens:
        count = min(num_tokens, MOST_AT_ONCE)
        prompt = [chance.randrange(4, 4000) for _ in range(count)]
        body = {"prompt": prompt, "max_tokens": 0, "session_id": session_id}
        client.post("/v1/completions", json=body).raise_for_status()
        num_tokens -= count


def first_token_s(client: httpx.Client, session_id: str) -> float:
    """Seconds from the request to the first event of the stream."""
    body = {"prompt": " and", "max_tokens": 8, "stream": True, "session_id": session_id}
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith("data: {"))
        seconds = time.perf_counter() - started
        for _ in lines:
            pass
    return seconds


def main(
    short: Annotated[int, typer.Option(help="Tokens of the short history.")] = 100,
    long: Annotated[int, typer.Option(help="Tokens of the long history.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Restarts.")] = 10,
    checkpoint: Annotated[Path, typer.Option(help="Folder of the model.")] = PRETRAINED,
) -> None:
    """Measure and print medians."""
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[int, str] = {}
        with server_process(checkpoint, Path(folder)) as server, server.client() as client:
            client.timeout = httpx.Timeout(3600)
            for length in (short, long):
                sessions[length] = client.post("/v1/sessions").json()["id"]
                read_history(client, sessions[length], length)
            server.stop()
        times: dict[int, list[float]] = {short: [], long: []}
        for number in range(rounds):
            with server_process(checkpoint, Path(folder)) as server, server.client() as client:
                warm = client.post("/v1/sessions").json()["id"]
                read_history(client, warm, short)
                first_token_s(client, warm)
                for length in (short, long) if number % 2 else (long, short):
                    times[length].append(first_token_s(client, sessions[length]))
                server.stop()
    medians = {length: statistics.median(taken) for length, taken in times.items()}
    for length, seconds in medians.items():
        print(f"history of {length:9,} tokens: first token after {1e3 * seconds:6.2f} ms")
    print(f"ratio {medians[long] / medians[short]:.3f}")


if __name__ == "__main__":
    typer.run(main)
