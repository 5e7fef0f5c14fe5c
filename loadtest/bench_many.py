"""Memory, disk and times of a server as its sessions become many."""

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from loadtest.bench_resume import first_token_s
from tests.server.processes import server_process

FLAGS = ("--keep-turns", "1", "--host-cache-bytes", str(32 << 20))
AT_ONCE = 16
MOST_PROBES = 200
PROMPT = "Once upon a time"


def print_many(checkpoint: Path, folder: Path, counts: list[int]) -> None:
    """Make sessions; measure and print whenever there are as many as in `counts`."""
    chance, session_ids = random.Random(0), list[str]()
    print(
        f"{'sessions':>8} {'RSS MiB':>8} {'disk MiB':>9} | {'create, p50, p99 ms':>20} | "
        f"{'first turn':>16} | {'resumed, first token':>20} | from the store"
    )
    with server_process(checkpoint, folder, *FLAGS) as server, server.client() as client:
        for count in sorted(counts):
            probes = min(MOST_PROBES, count // 2)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                new = count - probes - len(session_ids)
                session_ids += [made[0] for made in pool.map(lambda _: _begin(client), range(new))]
            old = list(session_ids)
            made = [_begin(client) for _ in range(probes)]
            session_ids += [session_id for session_id, _, _ in made]
            asked = chance.sample(old, min(len(old), probes))
            from_store, resumed = 0, []
            for session_id in asked:
                found = client.get(f"/v1/sessions/{session_id}").raise_for_status().json()
                from_store += found["tier"] == "store"
                resumed.append(first_token_s(client, session_id))
            disk = sum(file.stat().st_size for file in folder.iterdir())
            print(
                f"{count:8,} {_resident_bytes(client) / 2**20:8.0f} {disk / 2**20:9,.0f} |"
                f"{_percentiles([create_s for _, create_s, _ in made]):>21} |"
                f"{_percentiles([turn_s for _, _, turn_s in made]):>17} |"
                f"{_percentiles(resumed):>21} | {from_store / len(asked):.0%}",
                flush=True,
            )


def _begin(client: httpx.Client) -> tuple[str, float, float]:
    """A new session with one turn: its id, seconds to create it, seconds of the turn."""
    started = time.perf_counter()
    session_id = client.post("/v1/sessions").raise_for_status().json()["id"]
    created = time.perf_counter()
    turn = {"prompt": PROMPT, "max_tokens": 1, "session_id": session_id}
    client.post("/v1/completions", json=turn).raise_for_status()
    return session_id, created - started, time.perf_counter() - created


def _resident_bytes(client: httpx.Client) -> float:
    [found] = re.findall(
        r"^process_resident_memory_bytes (\S+)$", client.get("/metrics").text, re.M
    )
    return float(found)


def _percentiles(times: list[float]) -> str:
    p50, p99 = 1e3 * np.percentile(times, (50, 99))
    return f"{p50:.2f} {p99:.2f}"


def counts_up_to(most: int) -> Iterator[int]:
    """Where to measure on the way to so many sessions."""
    yield from (count for count in (100, 1_000, 2_500, 5_000, 10_000, 20_000) if count < most)
    yield most
