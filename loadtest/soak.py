"""Whether a server under a steady load leaks resources."""

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer

from loadtest import charts, options
from loadtest.bench import run, warm_up
from loadtest.client import Sample
from loadtest.load import Access, Stop, Target, target
from loadtest.measures import Interval, Objective, Summary, slope, summarise
from loadtest.processes import Held, Metrics, held, parse_metrics
from loadtest.results import console, show_summary, write_result
from loadtest.workload import Workload
from model import PRETRAINED
from tests.server.processes import ServerProcess, server_process

MIB = 1 << 20
HOUR_S = 3600.0
CACHES = {
    "beginnings of prompts": "latentd_prefix_cache_bytes",
    "states in host memory": 'latentd_session_bytes{tier="host"}',
    "states in rows": 'latentd_session_bytes{tier="device"}',
}
"""What a server says that it keeps in memory, and the metric of each."""

SETTLE_S = 3
"""Seconds between the last answer and the check that nothing still runs."""


@dataclass(frozen=True)
class Look:
    """A sample of the server's process, at a time of `time.perf_counter`."""

    at: float
    held: Held
    cached: Mapping[str, float]
    """Bytes, by the names of CACHES."""

    @property
    def sizes(self) -> dict[str, float]:
        """MiB of the process and of what is in it."""
        cached = {name: value / MIB for name, value in self.cached.items()}
        resident, anonymous = self.held.resident_bytes, self.held.anonymous_bytes
        return {"resident": resident / MIB, "not of files": anonymous / MIB} | cached


@dataclass(frozen=True)
class Soaked:
    """What was seen; moments are less the time in which this program was stopped."""

    warm_up: list[Sample]
    samples: list[Sample]
    """After the warm-up. Those that were in flight during a stop are among them only if failed."""

    looks: list[Look]
    began: float
    """The end of the warm-up."""

    stops: list[Stop]
    left: list[str]
    """What is left that should not be."""

    @property
    def settled(self) -> list[Look]:
        """Looks after the warm-up."""
        return [look for look in self.looks if look.at >= self.began]


async def watch(server: Target, pid: int, every_s: float, looks: list[Look]) -> None:
    """Look until cancelled."""
    while True:
        metrics = await read(server)
        cached = {name: metrics[metric] for name, metric in CACHES.items()}
        looks.append(Look(time.perf_counter(), held(pid), cached))
        await asyncio.sleep(every_s)


async def read(server: Target) -> Metrics:
    """Raises RuntimeError if the server is gone."""
    try:
        return parse_metrics((await server.http.get("/metrics")).text)
    except httpx.TransportError as error:
        raise RuntimeError(f"the server does not answer any more: {error!r}") from None


def slopes(looks: Sequence[Look]) -> dict[str, Interval]:
    """Growth an hour of what the process holds."""
    hours = [(look.at - looks[0].at) / HOUR_S for look in looks]
    columns = {
        "resident MiB": [look.held.resident_bytes / MIB for look in looks],
        "cached MiB": [sum(look.cached.values()) / MIB for look in looks],
        "descriptors": [float(look.held.descriptors) for look in looks],
        "threads": [float(look.held.threads) for look in looks],
    }
    return {name: slope(hours, values) for name, values in columns.items()}


async def soaked(
    server: ServerProcess,
    load: Workload,
    *,
    rate: float,
    warm_up_s: float,
    seconds: float,
    every_s: float,
    seed: int,
) -> Soaked:
    """Load a server for so many seconds, and before that for as many more as it is to warm up."""
    looks, stops = list[Look](), list[Stop]()
    async with target(server.url, Access(ignore_eos=True), load.sessions) as asked:
        await warm_up(asked, load)
        watching = asyncio.create_task(watch(asked, server.process.pid, every_s, looks))
        count = max(1, round(rate * (warm_up_s + seconds)))
        started = time.perf_counter()
        samples = await run(asked, load, users=None, rate=rate, count=count, seed=seed, stops=stops)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await asyncio.sleep(SETTLE_S)
        metrics = await read(asked)
    gauges = ("latentd_requests_running", "latentd_requests_waiting")
    left = [f"{name} is {metrics[name]:g} after the end" for name in gauges if metrics[name]]

    def moment(at: float) -> float:
        return at - sum(stop.seconds for stop in stops if stop.at < at)

    began = started + warm_up_s
    whole = [
        s for s in samples if s.error is not None or not any(_spans(s, stop) for stop in stops)
    ]
    return Soaked(
        warm_up=[sample for sample in whole if moment(sample.intended) < began],
        samples=[sample for sample in whole if moment(sample.intended) >= began],
        looks=[Look(moment(look.at), look.held, look.cached) for look in looks],
        began=began,
        stops=stops,
        left=left,
    )


def _spans(sample: Sample, stop: Stop) -> bool:
    return sample.intended < stop.at + stop.seconds and sample.ended > stop.at


def draw(path: Path, title: str, found: Soaked, summary: Summary) -> None:
    """Memory, descriptors and threads, and latencies over time."""
    start = found.looks[0].at
    minutes = [(look.at - start) / 60 for look in found.looks]
    warm = (found.began - start) / 60
    x = charts.Axis("minutes")
    with charts.figure(path, 3, title) as (memory, counts, latency):
        sizes = [look.sizes for look in found.looks]
        lines = {
            name: [(at, size[name]) for at, size in zip(minutes, sizes, strict=True)]
            for name in sizes[0]
        }
        charts.draw_lines(memory, "memory", x, charts.Axis("MiB"), lines, marker="")
        numbers = {
            "descriptors": [float(look.held.descriptors) for look in found.looks],
            "threads": [float(look.held.threads) for look in found.looks],
        }
        drawn = {name: list(zip(minutes, y, strict=True)) for name, y in numbers.items()}
        charts.draw_lines(counts, "held by the process", x, charts.Axis("number"), drawn, marker="")
        bins = np.linspace(0, max(minutes), 31)
        whole = [s for s in found.samples if s.ttft is not None and s.error is None]
        stopped = [sum(e.seconds for e in found.stops if e.at < s.intended) for s in whole]
        at = [(s.intended - late - start) / 60 for s, late in zip(whole, stopped, strict=True)]
        place_of = np.digitize(at, bins)
        ttft = np.array([1e3 * (s.ttft or 0) for s in whole])
        percentiles = {
            f"p{p}": [
                (float(bins[place - 1]), float(np.percentile(ttft[place_of == place], p)))
                for place in range(1, len(bins))
                if (place_of == place).any()
            ]
            for p in (50, 99)
        }
        name = f"time to first token ({sum(summary.errors.values()):,} errors)"
        charts.draw_lines(latency, name, x, charts.Axis("ms"), percentiles, marker="")
        for axes in (memory, counts, latency):
            axes.axvline(warm, color=charts.GREY, linestyle=":")


def show(found: Soaked, goals: Sequence[Objective]) -> tuple[Summary, dict[str, Interval]]:
    """On the terminal; returns the summary after the warm-up, and the slopes."""
    first, settled = found.looks[0].sizes, found.settled
    for name, before in first.items():
        warm, last = settled[0].sizes[name], settled[-1].sizes[name]
        line = f"{name}: {before:,.1f} MiB at first, {warm:,.1f} when warm, {last:,.1f} at the end"
        console.print(line, highlight=False)
    summary, grown = summarise(found.samples, goals), slopes(settled)
    show_summary("after the warm-up", summary)
    for name, interval in grown.items():
        console.print(f"{name} an hour: {interval}", highlight=False)
    for stop in found.stops:
        console.print(f"the load test was stopped for {stop.seconds:.0f} s", highlight=False)
    for problem in found.left:
        console.print(f"[red]{problem}", highlight=False)
    return summary, grown


def complaints(log: Path) -> list[str]:
    """Warnings and errors of the server's log."""
    return [f"in the server's log: {line}" for line in log.read_text().splitlines()]


def soak(
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second, Poisson.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="For how long.")] = 120.0,
    warm_up_minutes: Annotated[
        float, typer.Option(min=0, help="Before that, while caches fill; reported apart.")
    ] = 10.0,
    every_s: Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")] = 1.0,
    checkpoint: options.Checkpoint = PRETRAINED,
    slo: options.Objectives = None,
    prompt: options.Prompt = options.PROMPT,
    output: options.Output = options.OUTPUT,
    sessions: options.NumSessions = 20,
    resume: options.Resumed = 0.5,
    zipf: options.Zipf = 1.1,
    out: options.Out = None,
    svg: options.Svg = False,
    seed: options.Seed = 0,
) -> None:
    """Keep a latentd server under load for hours: slopes of memory, descriptors and threads.

    Ends with status 1 if a request failed, the server warned of anything, or something still ran
    after the last answer. A time in which this program is stopped is left out.
    """
    goals: list[Objective] = options.objectives(slo)
    load = options.workload(prompt, output, None, sessions, resume, zipf)
    if out is not None:
        charts.require()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with server_process(checkpoint, data, "--log-level", "warning") as server:
            found = asyncio.run(
                soaked(
                    *(server, load),
                    rate=rate,
                    warm_up_s=60 * warm_up_minutes,
                    seconds=60 * minutes,
                    every_s=every_s,
                    seed=seed,
                )
            )
        found.left.extend(complaints(data.with_name("data.log")))
    summary, grown = show(found, goals)
    failed_early = sum(sample.error is not None for sample in found.warm_up)
    if out is not None:
        settled = found.settled
        looks = {"first": found.looks[0], "warm": settled[0], "last": settled[-1]}
        result = {
            "summary": summary.to_json(),
            "errors while warming up": failed_early,
            "slopes_per_hour": {name: vars(interval) for name, interval in grown.items()},
            "MiB": {name: look.sizes for name, look in looks.items()},
            "stopped_s": [stop.seconds for stop in found.stops],
            "left": found.left,
        }
        write_result(out, result)
        title = f"{minutes:g} minutes at {rate:.3g} requests/s"
        draw(out / f"soak.{'svg' if svg else 'png'}", title, found, summary)
    if summary.errors or failed_early or found.left:
        raise typer.Exit(1)
