"""Compares several servers under the same load, in turn."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loadtest import charts, options
from loadtest.bench import CONCURRENCY, run, warm_up
from loadtest.load import Access, Target, target
from loadtest.measures import Interval, Summary, geometric_mean, summarise
from loadtest.results import console, write_result
from loadtest.workload import Workload

MEASURES: Mapping[str, Callable[[Summary], float]] = {
    "output tokens/s": lambda s: s.output_tokens_per_s,
    "answers/s": lambda s: s.requests_per_s,
    "time to first token, p50": lambda s: s.percentiles["ttft"]["p50"],
    "time to first token, p99": lambda s: s.percentiles["ttft"]["p99"],
    "time per output token, p50": lambda s: s.percentiles["tpot"]["p50"],
    "between tokens, p99": lambda s: s.percentiles["itl"]["p99"],
    "whole answer, p50": lambda s: s.percentiles["e2e"]["p50"],
}

Rounds = Sequence[Sequence[Summary]]
"""Samples by round, then by server."""


async def rounds_of(
    urls: Sequence[str],
    access: Access,
    load: Workload,
    *,
    rounds: int,
    users: int | None,
    rate: float | None,
    count: int,
    seed: int,
) -> Rounds:
    """Each round sends the same requests to all servers, starting with a different one each
    time."""
    found = list[list[Summary]]()
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(target(url, access, load.sessions)) for url in urls
        ]
        for server in servers:
            await warm_up(server, load)
        for number in range(rounds):
            order = [(number + place) % len(servers) for place in range(len(servers))]
            summaries = dict[int, Summary]()
            for place in order:
                summaries[place] = await measured(
                    *(servers[place], load),
                    users=users,
                    rate=rate,
                    count=count,
                    seed=seed + number,
                    label=f"round {number + 1} of {rounds}, {urls[place]}",
                )
            found.append([summaries[place] for place in range(len(servers))])
    return found


async def measured(
    server: Target,
    load: Workload,
    *,
    users: int | None,
    rate: float | None,
    count: int,
    seed: int,
    label: str,
) -> Summary:
    """Of one run. Raises RuntimeError if nothing was answered."""
    samples = await run(server, load, users=users, rate=rate, count=count, seed=seed, label=label)
    if all(sample.error is not None for sample in samples):
        raise RuntimeError(f"{server.http.base_url} answered nothing: {samples[0].error}")
    return summarise(samples, ())


def ratios(found: Rounds) -> list[dict[str, Interval]]:
    """For each server after the first: ratios of its measures to the first server's, round by
    round."""
    return [
        {
            name: geometric_mean([measure(each[place]) / measure(each[0]) for each in found])
            for name, measure in MEASURES.items()
            if all(_has(measure, summary) for each in found for summary in (each[0], each[place]))
        }
        for place in range(1, len(found[0]))
    ]


def _has(measure: Callable[[Summary], float], summary: Summary) -> bool:
    try:
        return measure(summary) > 0
    except KeyError:
        return False


def draw(path: Path, urls: Sequence[str], found: Sequence[Mapping[str, Interval]]) -> None:
    """Ratios with their intervals, with a line at 1."""
    with charts.figure(path, len(found), f"Over those of {urls[0]}") as many:
        for axes, url, intervals in zip(many, urls[1:], found, strict=True):
            for number, each in enumerate(reversed(list(intervals.values()))):
                axes.plot([each.low, each.high], [number, number], color=charts.BLUE, linewidth=2)
                axes.plot([each.value], [number], "o", color=charts.BLUE)
                label = f"{each.value:.2f}"
                axes.annotate(label, (each.value, number), (0, 5), textcoords="offset points")
            axes.axvline(1, color=charts.GREY, linestyle="--")
            axes.set_yticks(range(len(intervals)), list(reversed(list(intervals))))
            axes.set_ylim(-0.6, len(intervals) - 0.4)
            axes.set_title(url, loc="left", fontsize=10)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(charts.plain())
            axes.xaxis.set_minor_formatter(charts.plain())
            axes.tick_params(axis="x", which="both", labelrotation=45)
            axes.set_xlabel("ratio, with its 95 % interval")


def compare(
    urls: Annotated[
        list[str], typer.Argument(help="URLs of the servers; ratios are to the first.")
    ],
    rounds: Annotated[int, typer.Option(min=2, help="Rounds per server.")] = 6,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Closed loop: number of users, each with one request at a time."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests per second (Poisson).")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per round.")] = 40,
    out: options.Out = None,
    svg: options.Svg = False,
    prompt: options.Prompt = options.PROMPT,
    output: options.Output = options.OUTPUT,
    file: options.File = None,
    endpoint: options.AnyEndpoint = "completions",
    model: options.Model = None,
    key: options.Key = None,
    ignore_eos: options.IgnoreEos = False,
    below: options.Below = None,
    temperature: options.Temperature = None,
    timeout_s: options.Timeout = 600,
    seed: options.Seed = 0,
) -> None:
    """Send several servers the same load, round by round in one run: ratios with intervals."""
    if len(urls) < 2:
        raise typer.BadParameter("needs at least two servers", param_hint="URLS")
    if concurrency is not None and rate is not None:
        raise typer.BadParameter("give --concurrency or --rate, not both")
    load = options.workload(prompt, output, file, 0, 0.0, 1.1, below)
    access = Access(
        *(endpoint, model, key, ignore_eos, timeout_s, temperature), keeps_connections=False
    )
    if out is not None:
        charts.require()
    found = asyncio.run(
        rounds_of(
            *(urls, access, load),
            rounds=rounds,
            users=concurrency or CONCURRENCY,
            rate=rate,
            count=requests,
            seed=seed,
        )
    )
    by_server = ratios(found)
    table = Table(title=f"ratios to {urls[0]}, {rounds} rounds of {requests} requests each")
    table.add_column("")
    for url in urls[1:]:
        table.add_column(url, justify="right")
    for name in MEASURES:
        cells = [str(intervals[name]) if name in intervals else "-" for intervals in by_server]
        table.add_row(name, *cells)
    console.print(table)
    for place, url in enumerate(urls):
        failed = sum(sum(each[place].errors.values()) for each in found)
        if failed:
            console.print(f"[red]{url}: {failed:,} requests failed", highlight=False)
    if out is not None:
        result = {
            "urls": urls,
            "ratios": [{k: vars(v) for k, v in each.items()} for each in by_server],
            "rounds": [[summary.to_json() for summary in each] for each in found],
        }
        write_result(out, result)
        draw(out / f"compare.{'svg' if svg else 'png'}", urls, by_server)
