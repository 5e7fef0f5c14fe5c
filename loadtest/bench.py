"""Measures a server under one load."""

import asyncio
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest import charts, options
from loadtest.client import Sample
from loadtest.load import Access, Stop, Target, closed, opened, target
from loadtest.measures import summarise
from loadtest.results import console, show_summary, write_result
from loadtest.workload import Workload

CONCURRENCY = 8
WARM_UP = 2
"""Warm-up requests, not measured."""


def progress_bar() -> Progress:
    """Progress bar on a terminal; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


async def run(
    server: Target,
    load: Workload,
    *,
    users: int | None,
    rate: float | None,
    count: int,
    seed: int,
    label: str = "requests",
    stops: list[Stop] | None = None,
) -> list[Sample]:
    """The samples of one run: open at this rate, or else closed with so many users.

    `stops` are those of an open run, if it is to go on after them.
    """
    with progress_bar() as bar:
        task = bar.add_task(label, total=count)

        def progress() -> None:
            bar.advance(task)

        if rate is not None:
            return await opened(
                *(server, load),
                rate=rate,
                count=count,
                seed=seed,
                progress=progress,
                stops=stops,
            )
        users = users or CONCURRENCY
        return await closed(server, load, users=users, count=count, seed=seed, progress=progress)


async def warm_up(server: Target, load: Workload) -> None:
    """Send requests that are not measured, since the first ones load and compile. Raises
    RuntimeError."""
    samples = await closed(server, load, users=1, count=WARM_UP, seed=-1, progress=lambda: None)
    if all(sample.error is not None for sample in samples):
        raise RuntimeError(f"{server.http.base_url} rejects these requests: {samples[0].error}")


async def _bench(
    url: str,
    access: Access,
    load: Workload,
    users: int | None,
    rate: float | None,
    count: int,
    seed: int,
) -> list[Sample]:
    async with target(url, access, load.sessions) as server:
        await warm_up(server, load)
        return await run(server, load, users=users, rate=rate, count=count, seed=seed)


def bench(
    url: options.Url,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Closed loop: number of users, each with one request at a time."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests per second (Poisson).")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Total number of requests.")] = 200,
    slo: options.Objectives = None,
    out: options.Out = None,
    svg: options.Svg = False,
    prompt: options.Prompt = options.PROMPT,
    output: options.Output = options.OUTPUT,
    file: options.File = None,
    sessions: options.NumSessions = 0,
    resume: options.Resumed = 0.0,
    zipf: options.Zipf = 1.1,
    endpoint: options.AnyEndpoint = "completions",
    model: options.Model = None,
    key: options.Key = None,
    ignore_eos: options.IgnoreEos = False,
    timeout_s: options.Timeout = 600,
    seed: options.Seed = 0,
) -> None:
    """Measure any server with OpenAI's API: latencies, goodput, errors.

    With --rate, latencies are measured from the scheduled send time.
    """
    if concurrency is not None and rate is not None:
        raise typer.BadParameter("give --concurrency or --rate, not both")
    goals = options.objectives(slo)
    load = options.workload(prompt, output, file, sessions, resume, zipf)
    access = Access(endpoint, model, key, ignore_eos, timeout_s)
    if out is not None:
        charts.require()
    samples = asyncio.run(_bench(url, access, load, concurrency, rate, requests, seed))
    summary = summarise(samples, goals)
    how = f"{rate:g} requests/s" if rate else f"{concurrency or CONCURRENCY} concurrent"
    show_summary(f"{url}, {how}", summary)
    if out is not None:
        write_result(out, {"summary": summary.to_json()})
        path = out / f"bench.{'svg' if svg else 'png'}"
        charts.draw_bench(path, f"{requests:,} requests, {how}", samples, goals)
    if summary.errors:
        raise typer.Exit(1)
