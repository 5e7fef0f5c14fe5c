"""Thousands of sessions, created, parked and resumed at random; the content of each tier."""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from loadtest import charts, options
from loadtest.measures import spread
from loadtest.processes import held, read_metrics
from loadtest.results import console, write_result
from model import PRETRAINED
from tests.server.processes import ServerProcess, server_process

MIB = 1 << 20
HOST_CACHE_BYTES = 32 * MIB
"""Small, so that most sessions are only in the store."""

AT_ONCE = 16
PROMPT = "Once upon a time"
TIERS = ("device", "host", "store")


@dataclass(frozen=True)
class Count:
    """Measurements at one number of sessions."""

    sessions: int
    resident_bytes: int
    tier_sessions: dict[str, int]
    tier_bytes: dict[str, int]
    disk_bytes: int
    create_s: dict[str, float]
    """Percentiles, like those below."""

    first_s: dict[str, dict[str, float]]
    """Seconds to the first token of resumed sessions, by their tier."""


@dataclass(frozen=True)
class Resumed:
    tier: str
    first_token_s: float


def counts_up_to(most: int) -> Iterator[int]:
    """Numbers of sessions at which to measure."""
    yield from (count for count in (100, 300, 1_000, 3_000, 10_000, 30_000) if count < most)
    yield most


class Crowd:
    """All sessions of a server, each with its last acknowledged turn."""

    def __init__(self, client: httpx.Client, seed: int) -> None:
        self._client = client
        self._chance = random.Random(seed)
        self.turns: dict[str, int] = {}

    def create(self, count: int) -> list[float]:
        """Create sessions with one turn each; the seconds of each creation."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = list(pool.map(lambda _: self._begin(), range(count)))
        self.turns |= {session_id: 1 for session_id, _ in made}
        return [seconds for _, seconds in made]

    def resume(self, count: int) -> list[Resumed]:
        """Turns of random sessions, half of them among the ten most recently resumed."""
        found, recent = list[Resumed](), list[str]()
        everyone = list(self.turns)
        for _ in range(count):
            is_recent = recent and self._chance.random() < 0.5
            session_id = self._chance.choice(recent[-10:] if is_recent else everyone)
            found.append(self._resume(session_id))
            recent.append(session_id)
        return found

    def check(self, count: int) -> None:
        """Raises RuntimeError unless random sessions are at their acknowledged turns."""
        for session_id in self._chance.sample(list(self.turns), min(count, len(self.turns))):
            turn = self._look(session_id)["turn"]
            if turn != self.turns[session_id]:
                raise RuntimeError(f"{session_id} is at turn {turn}, not {self.turns[session_id]}")

    def _begin(self) -> tuple[str, float]:
        started = time.perf_counter()
        session_id: str = self._client.post("/v1/sessions").raise_for_status().json()["id"]
        seconds = time.perf_counter() - started
        body = {"prompt": PROMPT, "max_tokens": 1, "session_id": session_id}
        self._client.post("/v1/completions", json=body).raise_for_status()
        return session_id, seconds

    def _resume(self, session_id: str) -> Resumed:
        tier = self._look(session_id)["tier"]
        body = {"prompt": " and", "max_tokens": 4, "session_id": session_id, "stream": True}
        body |= {"expected_turn": self.turns[session_id]}
        started = time.perf_counter()
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data: {"))
            seconds = time.perf_counter() - started
            for _ in lines:
                pass
        self.turns[session_id] += 1
        return Resumed(tier, seconds)

    def _look(self, session_id: str) -> dict[str, Any]:
        response = self._client.get(f"/v1/sessions/{session_id}").raise_for_status()
        found: dict[str, Any] = response.json()
        return found


def measure(
    server: ServerProcess, client: httpx.Client, data: Path, sessions: int, probes: int, seed: int
) -> Iterator[Count]:
    """Measure at each number of sessions up to the last."""
    crowd = Crowd(client, seed)
    for count in counts_up_to(sessions):
        created = crowd.create(count - len(crowd.turns))
        resumed = crowd.resume(probes)
        crowd.check(probes)
        metrics = read_metrics(client)

        def tiers(name: str, metrics: dict[str, float] = metrics) -> dict[str, int]:
            return {tier: int(metrics.get(f'{name}{{tier="{tier}"}}', 0)) for tier in TIERS}

        by_tier = {
            tier: [one.first_token_s for one in resumed if one.tier == tier]
            for tier in sorted({one.tier for one in resumed})
        }
        yield Count(
            sessions=count,
            resident_bytes=held(server.process.pid).resident_bytes,
            tier_sessions=tiers("latentd_sessions"),
            tier_bytes=tiers("latentd_session_bytes"),
            disk_bytes=sum(file.stat().st_size for file in data.rglob("*") if file.is_file()),
            create_s=spread(created),
            first_s={tier: spread(times) for tier, times in by_tier.items()},
        )


def show(count: Count) -> None:
    """A line on the terminal."""
    tiers = ", ".join(f"{tier} {n / MIB:,.1f} MiB" for tier, n in count.tier_bytes.items())
    firsts = ", ".join(f"{tier} {1e3 * s['p50']:.1f} ms" for tier, s in count.first_s.items())
    console.print(
        f"{count.sessions:8,} sessions: server {count.resident_bytes / MIB:,.0f} MiB; held: "
        f"{tiers}; files {count.disk_bytes / MIB:,.0f} MiB; create p50 "
        f"{1e3 * count.create_s['p50']:.1f} ms; first token when resumed, p50: {firsts}",
        highlight=False,
        soft_wrap=True,
    )


def draw(path: Path, counts: Sequence[Count]) -> None:
    """Bytes by tier, and times, by the number of sessions."""
    x = charts.Axis("sessions", log=True)
    with charts.figure(path, 2, f"{counts[-1].sessions:,} sessions of one server") as (
        sizes,
        times,
    ):
        lines = {
            f"sessions: {tier}": [(c.sessions, c.tier_bytes[tier] / MIB) for c in counts]
            for tier in TIERS
            if any(c.tier_bytes[tier] for c in counts)
        }
        lines["server's resident memory"] = [(c.sessions, c.resident_bytes / MIB) for c in counts]
        charts.draw_lines(sizes, "bytes by tier", x, charts.Axis("MiB", log=True), lines)
        lines = {
            f"resumed from {tier}, p50": [
                (c.sessions, 1e3 * c.first_s[tier]["p50"]) for c in counts if tier in c.first_s
            ]
            for tier in ("warm", *TIERS)
        }
        lines["created, p50"] = [(c.sessions, 1e3 * c.create_s["p50"]) for c in counts]
        lines = {name: points for name, points in lines.items() if points}
        charts.draw_lines(times, "time to first token, and to create", x, charts.Axis("ms"), lines)


def many_sessions(
    sessions: Annotated[int, typer.Option(min=2, help="Final number of sessions.")] = 10_000,
    probes: Annotated[
        int, typer.Option(min=1, help="Sessions to resume at each measurement.")
    ] = 200,
    checkpoint: options.Checkpoint = PRETRAINED,
    out: options.Out = None,
    svg: options.Svg = False,
    seed: options.Seed = 0,
) -> None:
    """Create thousands of sessions, park and resume them at random: bytes by tier.

    Each turn expects the last acknowledged one, and thus verifies it.
    """
    if out is not None:
        charts.require()
    flags = ("--keep-turns", "1", "--host-cache-bytes", str(HOST_CACHE_BYTES))
    counts = list[Count]()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with server_process(checkpoint, data, *flags) as server, server.client() as client:
            for count in measure(server, client, data, sessions, probes, seed):
                show(count)
                counts.append(count)
    if out is not None:
        write_result(out, {"counts": [asdict(count) for count in counts]})
        draw(out / f"many-sessions.{'svg' if svg else 'png'}", counts)
