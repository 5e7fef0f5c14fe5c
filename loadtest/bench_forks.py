"""Time to fork and to rewind a session, by the length of its history."""

import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from loadtest.bench_resume import read_history
from tests.server.processes import server_process

HISTORY_TIMEOUT_S = 3600


def print_forks(checkpoint: Path, folder: Path, *, short: int, long: int, rounds: int) -> None:
    """Measure in turn, and print medians."""
    lengths = (short, long)
    times: dict[tuple[str, int], list[float]] = {}
    with server_process(checkpoint, folder) as server, server.client() as client:
        client.timeout = httpx.Timeout(HISTORY_TIMEOUT_S)
        sessions = {}
        for length in lengths:
            sessions[length] = client.post("/v1/sessions").raise_for_status().json()["id"]
            read_history(client, sessions[length], length)
        for number in range(rounds):
            for length in lengths if number % 2 else reversed(lengths):
                fork_s, rewind_s = _fork_and_rewind(client, sessions[length])
                times.setdefault(("fork", length), []).append(fork_s)
                times.setdefault(("rewind", length), []).append(rewind_s)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    print(f"{'':8} {short:>12,} tokens {long:>12,} tokens    ratio")
    for what in ("fork", "rewind"):
        shown = [medians[what, length] for length in lengths]
        print(f"{what:8}", *(f"{1e3 * s:16.2f} ms" for s in shown), f"{shown[1] / shown[0]:8.3f}")


def _fork_and_rewind(client: httpx.Client, session_id: str) -> tuple[float, float]:
    """Seconds to fork the session, and to rewind the fork by one turn."""
    fork_s, fork = _timed(client, f"/v1/sessions/{session_id}/fork", {})
    turn = {"prompt": " and", "max_tokens": 1, "session_id": fork["id"]}
    client.post("/v1/completions", json=turn).raise_for_status()
    path = f"/v1/sessions/{fork['id']}"
    rewind_s, rewound = _timed(client, f"{path}/rewind", {"turn": fork["turn"]})
    if rewound["tokens"] != fork["tokens"]:
        raise RuntimeError(f"rewound to {rewound}, not {fork}")
    client.delete(path).raise_for_status()
    return fork_s, rewind_s


def _timed(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    started = time.perf_counter()
    answer = client.post(path, json=body)
    seconds = time.perf_counter() - started
    return seconds, answer.raise_for_status().json()
