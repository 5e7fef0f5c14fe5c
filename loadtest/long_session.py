"""One session to a million tokens: cost per token by position, and the server's memory."""

import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from loadtest import charts, options
from loadtest.measures import Interval, geometric_mean
from loadtest.processes import held
from loadtest.results import console, write_result
from model import PRETRAINED
from tests.server.processes import ServerProcess, server_process

MIB = 1 << 20
PATIENCE_S = 3600
MAX_AT_ONCE = 50_000
"""Tokens per request while the history is read."""

SHORT = 1_000
"""Tokens of the short session that the long one is compared with."""

DECODED = 64
"""Tokens of a timed turn."""


@dataclass(frozen=True)
class Position:
    """Measurements at one length of the session."""

    tokens: int
    prefill_per_s: float
    """Prefill rate of the prompts up to here, in tokens per second."""

    token_s: float
    """Median seconds between tokens, over all turns here."""

    short_token_s: float
    """The same for a session that stays short, alternating with it."""

    first_token_s: float
    short_first_token_s: float
    state_bytes: int
    resident_bytes: int
    """Resident memory of the server."""


def positions(most: int) -> Iterator[int]:
    """1, 2 and 5 times each power of ten, from SHORT up to `most`, and `most`."""
    step = SHORT
    while step < most:
        yield from (step * factor for factor in (1, 2, 5) if step * factor < most)
        step *= 10
    yield most


class Session:
    """A session of a server, advanced by prompts and by timed turns."""

    def __init__(self, client: httpx.Client, vocabulary: int, seed: int) -> None:
        self.client = client
        self._chance = random.Random(seed)
        self._vocabulary = vocabulary
        self.id: str = client.post("/v1/sessions").raise_for_status().json()["id"]
        self.tokens = 0

    def grow(self, tokens: int) -> None:
        """Read random tokens up to this length."""
        while self.tokens < tokens:
            count = min(tokens - self.tokens, MAX_AT_ONCE)
            prompt = [self._chance.randrange(4, self._vocabulary) for _ in range(count)]
            body = {"prompt": prompt, "max_tokens": 0, "session_id": self.id}
            self.client.post("/v1/completions", json=body).raise_for_status()
            self.tokens = self.look()["tokens"]

    def turn(self) -> tuple[float, list[float]]:
        """Seconds to the first token of a turn, and between its tokens."""
        body = {"prompt": " and", "max_tokens": DECODED, "session_id": self.id, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"continuous_usage_stats": True}}
        started, moments = time.perf_counter(), list[float]()
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    moments.append(time.perf_counter())
        return moments[0] - started, [b - a for a, b in pairwise(moments[:-1])]

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/v1/sessions/{self.id}").raise_for_status().json()
        return found


def measure_position(
    server: ServerProcess, long: Session, short: Session, target: int, turns: int
) -> Position:
    """Grow the long session to the target, then time turns of both alternately."""
    before, started = long.tokens, time.perf_counter()
    long.grow(target)
    seconds = time.perf_counter() - started
    gaps: dict[Session, list[float]] = {long: [], short: []}
    firsts: dict[Session, list[float]] = {long: [], short: []}
    for number in range(turns):
        for session in (long, short) if number % 2 else (short, long):
            first, between = session.turn()
            firsts[session].append(first)
            gaps[session] += between
    found = long.look()
    position = Position(
        tokens=target,
        prefill_per_s=(target - before) / seconds,
        token_s=statistics.median(gaps[long]),
        short_token_s=statistics.median(gaps[short]),
        first_token_s=statistics.median(firsts[long]),
        short_first_token_s=statistics.median(firsts[short]),
        state_bytes=found["state_bytes"],
        resident_bytes=held(server.process.pid).resident_bytes,
    )
    long.tokens = found["tokens"]
    return position


def timed(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[float, Any]:
    """Seconds of a call, and its response."""
    started = time.perf_counter()
    answer = client.post(path, json=body)
    return time.perf_counter() - started, answer.raise_for_status().json()


def fork_and_rewind(client: httpx.Client, session_id: str) -> tuple[float, float]:
    """Seconds to fork the session, and to rewind the fork by one turn."""
    fork_s, fork = timed(client, f"/v1/sessions/{session_id}/fork", {})
    turn = {"prompt": " and", "max_tokens": 1, "session_id": fork["id"]}
    client.post("/v1/completions", json=turn).raise_for_status()
    rewind_s, rewound = timed(client, f"/v1/sessions/{fork['id']}/rewind", {"turn": fork["turn"]})
    if rewound["tokens"] != fork["tokens"]:
        raise RuntimeError(f"rewound to {rewound}, not {fork}")
    client.delete(f"/v1/sessions/{fork['id']}").raise_for_status()
    return fork_s, rewind_s


Pairs = dict[str, list[tuple[float, float]]]
"""By operation: seconds with the long and with the short session, round by round."""


def end_to_end(
    checkpoint: Path,
    data: Path,
    flags: Sequence[str],
    tokens: int,
    turns: int,
    rounds: int,
    seed: int,
) -> tuple[list[Position], Pairs, list[float]]:
    """Grow and time a session; fork and rewind it; restart the server and resume it.

    The last are first tokens after restarts over those of the next turns.
    """
    found, pairs, restarts = list[Position](), Pairs(), list[float]()
    with server_process(checkpoint, data, *flags) as server, server.client() as client:
        client.timeout = httpx.Timeout(PATIENCE_S)
        [model] = client.get("/v1/models").raise_for_status().json()["data"]
        vocabulary = model["vocab_size"]
        long, short = (Session(client, vocabulary, seed + number) for number in range(2))
        short.grow(SHORT)
        for target in positions(tokens):
            found.append(measure_position(server, long, short, target, turns))
            last = found[-1]
            console.print(
                f"{last.tokens:10,} tokens: {1e3 * last.token_s:.3f} ms per token "
                f"(short: {1e3 * last.short_token_s:.3f}), {last.state_bytes:,} bytes, server "
                f"{last.resident_bytes / MIB:,.0f} MiB, read at {last.prefill_per_s:,.0f} tokens/s",
                highlight=False,
            )
        for number in range(rounds):
            both = [(s, fork_and_rewind(client, s.id)) for s in _order(long, short, number)]
            times = dict(both)
            for place, name in enumerate(("fork", "rewind")):
                pairs.setdefault(name, []).append((times[long][place], times[short][place]))
        server.stop()
    for number in range(rounds):
        with server_process(checkpoint, data, *flags) as server, server.client() as client:
            warm = Session(client, vocabulary, seed)
            warm.grow(10)
            warm.turn()
            firsts = dict[Session, float]()
            for session in _order(long, short, number):
                session.client = client
                firsts[session] = session.turn()[0]
                restarts.append(firsts[session] / session.turn()[0])
            pair = (firsts[long], firsts[short])
            pairs.setdefault("first token after a restart", []).append(pair)
            server.stop()
    return found, pairs, restarts


def _order(long: Session, short: Session, number: int) -> tuple[Session, Session]:
    """Alternates which session is first."""
    return (long, short) if number % 2 else (short, long)


def draw(path: Path, found: Sequence[Position]) -> None:
    """Time per token, and memory, by position."""
    title = f"One session to {found[-1].tokens:,} tokens"
    x = charts.Axis("tokens in the session", log=True)
    with charts.figure(path, 3, title) as (times, held_by, read):
        lines = {
            "this session": [(p.tokens, 1e3 * p.token_s) for p in found],
            "one that stays at about 1,000, alternating": [
                (p.tokens, 1e3 * p.short_token_s) for p in found
            ],
        }
        charts.draw_lines(times, "time per token", x, charts.Axis("ms"), lines)
        lines = {
            "the server's resident memory": [(p.tokens, p.resident_bytes / MIB) for p in found],
            "the session's state": [(p.tokens, p.state_bytes / MIB) for p in found],
        }
        charts.draw_lines(held_by, "memory", x, charts.Axis("MiB", log=True), lines)
        lines = {"prompts": [(p.tokens, p.prefill_per_s) for p in found]}
        charts.draw_lines(read, "reading prompts", x, charts.Axis("tokens/s"), lines)


def long_session(
    tokens: Annotated[
        int, typer.Option(min=SHORT, help="Final tokens of the session.")
    ] = 1_000_000,
    turns: Annotated[int, typer.Option(min=1, help="Timed turns at each length.")] = 5,
    rounds: Annotated[int, typer.Option(min=2, help="Number of forks, rewinds and restarts.")] = 5,
    checkpoint: options.Checkpoint = PRETRAINED,
    dtype: Annotated[str | None, typer.Option(help="The server's --dtype.")] = None,
    out: options.Out = None,
    svg: options.Svg = False,
    seed: options.Seed = 0,
) -> None:
    """Grow one session of a latentd server to a million tokens: time and memory by position.

    Its history is random tokens, read as prompts; at each measured length, 64 tokens per turn are
    decoded, alternating with a session that stays short. Then both are forked, rewound, and resumed
    after restarts of the server.
    """
    if out is not None:
        charts.require()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        flags = () if dtype is None else ("--dtype", dtype)
        found, pairs, restarts = end_to_end(
            checkpoint, data, flags, tokens=tokens, turns=turns, rounds=rounds, seed=seed
        )
    by_position = geometric_mean([p.token_s / p.short_token_s for p in found])
    ratios: dict[str, Interval] = {"time of a token, all positions": by_position}
    ratios["first token after a restart, over the next turn's"] = geometric_mean(restarts)
    table = Table("", f"{tokens:,} tokens", f"about {SHORT:,}", "ratio", title="medians")
    for name, both in pairs.items():
        ratios[name] = geometric_mean([long / short for long, short in both])
        medians = (f"{1e3 * statistics.median(times):.2f} ms" for times in zip(*both, strict=True))
        table.add_row(name, *medians, str(ratios[name]))
    console.print(table)
    console.print(f"time of a token, long over short: {by_position}", highlight=False)
    last = found[-1]
    console.print(f"at the end: {last.token_s / last.short_token_s:.3f}", highlight=False)
    console.print(
        f"first token after a restart, over the next turn's: {geometric_mean(restarts)}",
        highlight=False,
    )
    if out is not None:
        result = {
            "decoded_tokens": len(found) * turns * DECODED,
            "positions": [asdict(position) for position in found],
            "seconds": pairs,
            "ratios": {name: vars(interval) for name, interval in ratios.items()},
        }
        write_result(out, result)
        draw(out / f"long-session.{'svg' if svg else 'png'}", found)
