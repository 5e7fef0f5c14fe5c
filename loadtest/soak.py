"""Whether a server under a steady load leaks resources."""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from loadtest import charts, options
from loadtest.bench import run, warm_up
from loadtest.client import Sample
from loadtest.load import Access, target
from loadtest.measures import Interval, Objective, Summary, slope, summarise
from loadtest.processes import Held, held, parse_metrics
from loadtest.results import console, show_summary, write_result
from loadtest.workload import Workload
from model import PRETRAINED
from tests.server.processes import ServerProcess, server_process

MIB = 1 << 20
HOUR_S = 3600.0
SETTLED = 0.2
"""Share of the time excluded from slopes: caches fill and allocators grow first."""

SETTLE_S = 3
"""Seconds between the last answer and the check that nothing still runs."""


@dataclass(frozen=True)
class Look:
    """A sample of the server's process, at a time of `time.perf_counter`."""

    at: float
    held: Held


async def watch(pid: int, every_s: float, looks: list[Look]) -> None:
    """Sample until cancelled."""
    while True:
        looks.append(Look(time.perf_counter(), held(pid)))
        await asyncio.sleep(every_s)


def slopes(looks: Sequence[Look]) -> dict[str, Interval]:
    """Growth per hour of the process's resources, after the start."""
    settled = looks[int(SETTLED * len(looks)) :]
    hours = [(look.at - looks[0].at) / HOUR_S for look in settled]
    columns = {
        "resident MiB": [look.held.resident_bytes / MIB for look in settled],
        "descriptors": [float(look.held.descriptors) for look in settled],
        "threads": [float(look.held.threads) for look in settled],
    }
    return {name: slope(hours, values) for name, values in columns.items()}


async def soaked(
    server: ServerProcess, load: Workload, *, rate: float, seconds: float, every_s: float, seed: int
) -> tuple[list[Sample], list[Look], list[str]]:
    """Samples of requests and of the process, and what still runs at the end."""
    looks = list[Look]()
    async with target(server.url, Access(ignore_eos=True), load.sessions) as asked:
        await warm_up(asked, load)
        watching = asyncio.create_task(watch(server.process.pid, every_s, looks))
        count = max(1, round(rate * seconds))
        samples = await run(asked, load, users=None, rate=rate, count=count, seed=seed)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await asyncio.sleep(SETTLE_S)
        metrics = parse_metrics((await asked.http.get("/metrics")).text)
    gauges = ("latentd_requests_running", "latentd_requests_waiting")
    left = [f"{name} is {metrics[name]:g} after the end" for name in gauges if metrics[name]]
    return samples, looks, left


def draw(
    path: Path, title: str, looks: Sequence[Look], samples: Sequence[Sample], summary: Summary
) -> None:
    """Resident memory, descriptors and threads, and latencies over time."""
    began = looks[0].at
    minutes = [(look.at - began) / 60 for look in looks]
    x = charts.Axis("minutes")
    with charts.figure(path, 3, title) as (memory, counts, latency):
        resident = [look.held.resident_bytes / MIB for look in looks]
        line = {"resident": list(zip(minutes, resident, strict=True))}
        charts.draw_lines(memory, "resident memory", x, charts.Axis("MiB"), line, marker="")
        lines = {
            "descriptors": [float(look.held.descriptors) for look in looks],
            "threads": [float(look.held.threads) for look in looks],
        }
        drawn = {name: list(zip(minutes, y, strict=True)) for name, y in lines.items()}
        charts.draw_lines(counts, "held by the process", x, charts.Axis("number"), drawn, marker="")
        bins = np.linspace(0, max(minutes), 31)
        whole = [s for s in samples if s.ttft is not None and s.error is None]
        at = np.digitize([(s.intended - began) / 60 for s in whole], bins)
        ttft = np.array([1e3 * (s.ttft or 0) for s in whole])
        percentiles = {
            f"p{p}": [
                (float(bins[place - 1]), float(np.percentile(ttft[at == place], p)))
                for place in range(1, len(bins))
                if (at == place).any()
            ]
            for p in (50, 99)
        }
        name = f"time to first token ({sum(summary.errors.values()):,} errors)"
        charts.draw_lines(latency, name, x, charts.Axis("ms"), percentiles, marker="")


def soak(
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second (Poisson).")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Duration in minutes.")] = 120.0,
    every_s: Annotated[
        float, typer.Option(min=0.05, help="Seconds between samples of the process.")
    ] = 1.0,
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

    Ends with status 1 if a request failed or something still ran after the last answer.
    """
    goals: list[Objective] = options.objectives(slo)
    load = options.workload(prompt, output, None, sessions, resume, zipf)
    if out is not None:
        charts.require()
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(checkpoint, Path(folder) / "data", "--log-level", "warning") as server,
    ):
        seconds = 60 * minutes
        samples, looks, left = asyncio.run(
            soaked(server, load, rate=rate, seconds=seconds, every_s=every_s, seed=seed)
        )
    summary, grown = summarise(samples, goals), slopes(looks)
    title = f"{minutes:g} minutes at {rate:.3g} requests/s"
    show_summary(title, summary)
    for name, interval in grown.items():
        console.print(f"{name} an hour: {interval}", highlight=False)
    for problem in left:
        console.print(f"[red]{problem}", highlight=False)
    if out is not None:
        result = {
            "summary": summary.to_json(),
            "slopes_per_hour": {name: vars(interval) for name, interval in grown.items()},
            "left": left,
        }
        write_result(out, result)
        draw(out / f"soak.{'svg' if svg else 'png'}", title, looks, samples, summary)
    if summary.errors or left:
        raise typer.Exit(1)
