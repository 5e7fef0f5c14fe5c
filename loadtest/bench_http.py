"""Tokens per second over HTTP/SSE next to the bare engine, and the gaps caused by a long prompt.

    python -m loadtest http

32 streams of the default model. The bare engine runs in a separate process without a server; then a
server is started, with this process as its client. Both alternate several times: medians are shown.
"""

import asyncio
import json
import queue
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import typer

from loadtest.processes import started
from model import PRETRAINED
from model.checkpoint import load
from model.decoding.sampling import SamplingParams
from server.api.app import engine_limits
from server.engine.device import choose_device, choose_threads
from server.engine.engine import Engine
from server.engine.messages import Continuation, EngineRequest, Event, Finished, RowReleased
from server.engine.sizes import choose, free_memory
from server.metrics import Metrics
from server.settings import Settings

PROMPT = "Once upon a time there was"


class BareEngine:
    """The engine without a server, in this process."""

    def __init__(self, threads: int | None) -> None:
        checkpoint = load(PRETRAINED, choose_device("auto")[0])
        choose_threads(threads, checkpoint.network)
        self.checkpoint = checkpoint
        self.ids = tuple(checkpoint.tokenizer.encode(PROMPT))
        self.happened: queue.SimpleQueue[tuple[float, list[Event | RowReleased]]] = (
            queue.SimpleQueue()
        )
        state_bytes = checkpoint.network.state_spec.num_bytes
        sizes = choose(Settings(), state_bytes, free_memory(checkpoint.network.device))
        limits = engine_limits(Settings(), sizes)
        self.engine = Engine(checkpoint, limits, self._deliver, Metrics())
        self.engine.start()

    def submit(self, name: str, ids: tuple[int, ...], tokens: int) -> None:
        sampling = SamplingParams(temperature=0.8, seed=len(name))
        request = EngineRequest(name, None, Continuation(), ids, tokens, sampling)
        self.engine.submit(replace(request, ignore_eos=True))

    def rate(self, streams: int, tokens: int) -> float:
        """Tokens per second of so many streams."""
        started = time.perf_counter()
        for i in range(streams):
            self.submit(f"{i}", self.ids, tokens)
        left, generated = streams, 0
        while left:
            ended = [event for event in self.happened.get()[1] if isinstance(event, Finished)]
            left -= len(ended)
            generated += sum(event.num_generated for event in ended)
        return generated / (time.perf_counter() - started)

    def gaps(self) -> tuple[float, float]:
        """Median seconds between tokens of 16 streams, and the largest while a long prompt is
        read."""
        for i in range(16):
            self.submit(f"{i}", self.ids, 20_000)
        before = self._gaps(lambda steps, _: steps == 600)
        self.submit("long", tuple(7 + i % 4000 for i in range(8000)), 1)
        during = self._gaps(
            lambda _, events: any(
                isinstance(event, Finished) and event.request_id == "long" for event in events
            )
        )
        return statistics.median(before[100:]), max(during)

    def _gaps(self, is_last: Callable[[int, list[Event | RowReleased]], bool]) -> list[float]:
        """Seconds between the steps until the last one; each step has a token for every running
        stream."""
        moments = []
        while True:
            at, events = self.happened.get()
            moments.append(at)
            if is_last(len(moments), events):
                return [b - a for a, b in pairwise(moments)]

    def _deliver(self, events: list[Event | RowReleased]) -> None:
        self.happened.put((time.perf_counter(), events))


@contextmanager
def server(*flags: str) -> Iterator[int]:
    """A server of the default model on a free port."""
    with started("server", "serve", *flags) as found:
        yield found.port


async def stream(port: int, body: dict[str, object], times: list[float]) -> int:
    """Read a stream to its end; appends the times of its events, and returns its number of
    tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(
        {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}} | body
    ).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    last = b""
    while chunk := await reader.read(65536):
        times.extend([time.perf_counter()] * chunk.count(b"data: {"))
        last = (last + chunk)[-2000:]
    writer.close()
    usage = re.findall(rb'"completion_tokens":(\d+)', last)
    if not usage:
        raise RuntimeError(f"a stream ended without its usage: {last!r}")
    return int(usage[-1])


async def delivered(port: int, streams: int, tokens: int) -> float:
    """Tokens per second over HTTP."""

    async def all_streams(num_tokens: int) -> int:
        bodies = (
            {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0.8, "seed": i}
            for i in range(streams)
        )
        return sum(await asyncio.gather(*(stream(port, body, []) for body in bodies)))

    await all_streams(20)
    started = time.perf_counter()
    count = await all_streams(tokens)
    return count / (time.perf_counter() - started)


async def gaps(port: int) -> tuple[float, float]:
    """`BareEngine.gaps` as seen by clients."""
    times: list[list[float]] = [[] for _ in range(16)]
    tasks = [
        asyncio.create_task(
            stream(port, {"prompt": PROMPT, "max_tokens": 20_000, "seed": i}, times[i])
        )
        for i in range(16)
    ]
    await asyncio.sleep(2)
    before = [b - a for own in times for a, b in pairwise(own[100:]) if b > a]
    arrived = time.perf_counter()
    prompt = [7 + i % 4000 for i in range(8000)]
    await stream(port, {"prompt": prompt, "max_tokens": 1}, [])
    ended = time.perf_counter()
    during = [[at for at in own if arrived <= at <= ended] for own in times]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    largest = max(b - a for own in during for a, b in pairwise(own))
    return statistics.median(before), largest


def main(
    streams: Annotated[int, typer.Option(help="Concurrent streams.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens per stream.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    bare_only: Annotated[bool, typer.Option(help="Print the bare engine's rate and end.")] = False,
) -> None:
    """Measure and print."""
    flags = [] if threads is None else ["--threads", str(threads)]
    if bare_only:
        engine = BareEngine(threads)
        engine.rate(streams, 20)
        print(engine.rate(streams, tokens), *engine.gaps())
        engine.engine.stop()
        return
    alone = [sys.executable, "-m", "loadtest.bench_http", "--bare-only", *flags]
    alone += ["--streams", str(streams), "--tokens", str(tokens)]
    bare, http = [], []
    for _ in range(rounds):
        printed = subprocess.run(alone, capture_output=True, text=True, check=True).stdout
        bare.append([float(number) for number in printed.split()])
        with server("--log-level", "warning", *flags) as port:
            rate = asyncio.run(delivered(port, streams, tokens))
            http.append([rate, *asyncio.run(gaps(port))])
    medians = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (bare, http)
    )
    (engine_rate, *engine_gaps), (http_rate, *http_gaps) = medians
    print(
        f"{streams} streams: bare engine {engine_rate:,.0f} tokens/s, "
        f"over HTTP {http_rate:,.0f} tokens/s, ratio {http_rate / engine_rate:.2f}"
    )
    print("16 streams while an 8,000-token prompt arrives:")
    for place, (step, largest) in (("engine", engine_gaps), ("HTTP", http_gaps)):
        print(
            f"  {place}: {1e3 * step:.2f} ms between tokens before, largest gap "
            f"{1e3 * largest:.2f} ms: {largest / step:.1f} steps"
        )


if __name__ == "__main__":
    typer.run(main)
