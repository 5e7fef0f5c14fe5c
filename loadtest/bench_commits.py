"""Cost of a durable turn: in the store alone, in a server, and as a plain write with fsync.

python -m loadtest commits
"""

import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from model import PRETRAINED
from server.sessions.sqlite.schema import Durability
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, NewState
from tests.server.processes import server_process

DURABILITIES: tuple[Durability, ...] = ("sync", "async")
KEEP_TURNS = 8
TOKENS_TOGETHER = 16
"""Tokens of each turn of a group that finishes together."""


def count_transactions(store: SQLiteStore) -> list[int]:
    """A list that collects the sizes of the store's transactions from now on."""
    sizes, run = list[int](), store._writer._run_together

    def counted(jobs: Sequence[Any]) -> None:
        sizes.append(len(jobs))
        run(jobs)

    store._writer._run_together = counted  # type: ignore[method-assign]
    return sizes


def print_commits(
    checkpoint: Path, folder: Path, *, turns: int, together: int, rounds: int
) -> None:
    """Measure and print; `turns` of one session alone, `rounds` of `together` concurrent ones."""
    servers = [
        _in_a_server(checkpoint, folder / durability, durability, turns, together, rounds)
        for durability in DURABILITIES
    ]
    blob = servers[0][1]
    print(f"commits of turns whose state has {len(blob):,} bytes")
    print(f"{'in the store alone':24} {'sessions':>8} {'p50 ms':>8} {'p99 ms':>8}  transactions")
    for durability in DURABILITIES:
        for sessions, repeats in ((1, turns), (together, rounds)):
            path = folder / f"{durability}-{sessions}.sqlite3"
            times, num_transactions = asyncio.run(
                _in_the_store(path, durability, blob, sessions, repeats)
            )
            print(_row(durability, sessions, times), f" {num_transactions / repeats:.1f} per round")
    print("in a server: mean by its metrics; from the last token to the end by the client")
    for lines, _ in servers:
        print(*lines, sep="\n")
    print("the same bytes overwriting a file, and fsync")
    for sessions, repeats in ((1, turns), (together, rounds)):
        times = _written_and_synced(folder / "plain", sessions * blob, repeats)
        print(_row("", sessions, times))


async def _in_the_store(
    path: Path, durability: Durability, blob: bytes, sessions: int, rounds: int
) -> tuple[list[float], int]:
    """Seconds per commit and the total number of transactions, when all sessions commit at once."""
    store, now = SQLiteStore(path, durability), time.time()

    async def commit(name: str, turn: int) -> float:
        entry = Entry("session", name, "", now, now, turn, num_tokens=turn)
        state = NewState(f"{name}-{turn}", blob)
        started = time.perf_counter()
        await store.advance(entry, state, KEEP_TURNS)
        return time.perf_counter() - started

    try:
        names = [f"{number}" for number in range(sessions)]
        for name in names:
            await store.insert(Entry("session", name, "", now, now))
        for turn in range(1, KEEP_TURNS + 1):
            await asyncio.gather(*(commit(name, turn) for name in names))
        transactions, times = count_transactions(store), list[float]()
        for turn in range(KEEP_TURNS + 1, KEEP_TURNS + 1 + rounds):
            times += await asyncio.gather(*(commit(name, turn) for name in names))
        return times, len(transactions)
    finally:
        await store.close()


def _in_a_server(
    checkpoint: Path, folder: Path, durability: Durability, turns: int, together: int, rounds: int
) -> tuple[list[str], bytes]:
    """Lines of the table, and a state as stored."""
    with server_process(checkpoint, folder, "--durability", durability) as server:
        return asyncio.run(_over_http(server.url, durability, turns, together, rounds))


async def _over_http(
    url: str, durability: Durability, turns: int, together: int, rounds: int
) -> tuple[list[str], bytes]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        lines = []
        session_ids: list[str] = []
        for sessions, repeats, tokens in ((1, turns, 1), (together, rounds, TOKENS_TOGETHER)):
            session_ids = [
                (await http.post("/v1/sessions")).raise_for_status().json()["id"]
                for _ in range(sessions)
            ]
            before, times = await _commit_seconds(http), list[float]()
            for _ in range(repeats):
                ends = await asyncio.gather(*(_end_s(http, name, tokens) for name in session_ids))
                times += [seconds for seconds in ends if seconds is not None]
            total, count = np.subtract(await _commit_seconds(http), before)
            mean = f"  mean {1e3 * total / count:.2f} ms"
            lines.append(_row(durability, sessions, times) + mean)
        state = await http.get(f"/v1/sessions/{session_ids[0]}/state")
        return lines, state.raise_for_status().content


async def _end_s(http: httpx.AsyncClient, session_id: str, tokens: int) -> float | None:
    """Seconds from a stream's last token to its end; None if that token has no text."""
    body = {"prompt": " and", "max_tokens": tokens, "session_id": session_id, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    last = None
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line.removeprefix("data: "))
            if event["choices"][0]["finish_reason"] is not None:
                return None if last is None else now - last
            if event["usage"]["completion_tokens"] == tokens:
                last = now
    raise RuntimeError("a stream ended without a reason")


async def _commit_seconds(http: httpx.AsyncClient) -> tuple[float, float]:
    """Sum and count of the server's commits."""
    text = (await http.get("/metrics")).text
    total, count = (
        float(re.findall(rf"^latentd_session_commit_seconds_{part} (\S+)$", text, re.M)[0])
        for part in ("sum", "count")
    )
    return total, count


def _written_and_synced(path: Path, content: bytes, rounds: int) -> list[float]:
    times = []
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for _ in range(rounds):
            started = time.perf_counter()
            os.pwrite(file, content, 0)
            os.fsync(file)
            times.append(time.perf_counter() - started)
    finally:
        os.close(file)
    return times[1:] or times


def _row(what: str, sessions: int, times: Sequence[float]) -> str:
    p50, p99 = 1e3 * np.percentile(times, (50, 99)) if times else (np.nan, np.nan)
    return f"{what:24} {sessions:8} {p50:8.2f} {p99:8.2f}"


def main(
    turns: Annotated[int, typer.Option(help="Turns of a single session.")] = 300,
    together: Annotated[int, typer.Option(help="Sessions that finish at the same time.")] = 32,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 50,
    checkpoint: Annotated[Path, typer.Option(help="Folder of the model.")] = PRETRAINED,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        print_commits(checkpoint, Path(folder), turns=turns, together=together, rounds=rounds)
