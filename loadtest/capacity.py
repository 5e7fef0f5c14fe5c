"""The highest rate of requests at which a server meets its objectives."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from loadtest import charts, options
from loadtest.bench import run, warm_up
from loadtest.load import Access, Target, target
from loadtest.measures import Objective, Summary, summarise
from loadtest.results import console, show_summary, write_result
from loadtest.workload import Workload

MAX_DOUBLINGS = 16
MAX_HALVINGS = 5
"""Limited because a trial at half the rate takes twice as long."""


@dataclass(frozen=True)
class Trial:
    """Result of one rate."""

    rate: float
    summary: Summary
    holds: bool
    """Whether enough requests met the objectives."""


@dataclass(frozen=True)
class Search:
    """Parameters of the search."""

    objectives: Sequence[Objective]
    share: float
    """Share of the requests that must meet the objectives."""

    first: float
    seconds: float
    """Duration of a trial; at least `fewest` requests."""

    fewest: int
    most: float
    """A rate that the search does not go beyond."""

    precision: float
    """The search ends when the highest good and the lowest bad rate differ by this fraction."""


async def search(server: Target, load: Workload, how: Search, seed: int) -> list[Trial]:
    """Trials from the first rate up (or down) by doubling, then by bisection.

    Ends early if the highest rate that may be tried holds. Each trial has requests and moments of
    its own, and ends when all of its requests are answered.
    """
    trials = list[Trial]()

    async def holds(rate: float) -> bool:
        count = max(how.fewest, round(rate * how.seconds))
        label = f"{rate:.3g} requests/s"
        samples = await run(
            *(server, load),
            users=None,
            rate=rate,
            count=count,
            seed=seed + len(trials),
            label=label,
        )
        summary = summarise(samples, how.objectives)
        trials.append(Trial(rate, summary, summary.attainment >= how.share))
        verdict = "[green]holds" if trials[-1].holds else "[red]fails"
        console.print(f"{label:>20}: {summary.attainment:6.1%} good, {verdict}", highlight=False)
        return trials[-1].holds

    low, high = 0.0, min(how.first, how.most)
    for _ in range(MAX_DOUBLINGS):
        if not await holds(high):
            break
        if high >= how.most:
            return trials
        low, high = high, min(2 * high, how.most)
    else:
        raise RuntimeError(f"even {low:g} requests/s meet the objectives: begin at a higher --rate")
    for _ in range(MAX_HALVINGS):
        if low:
            break
        if await holds(high / 2):
            low = high / 2
        else:
            high /= 2
    if not low:
        raise RuntimeError(
            f"not even {high:g} requests/s meet the objectives: begin at a lower --rate"
        )
    while high / low > 1 + how.precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return trials


def highest(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest rate that meets the objectives."""
    return max((trial for trial in trials if trial.holds), key=lambda trial: trial.rate)


def draw(path: Path, trials: Sequence[Trial], how: Search) -> None:
    """Goodput and latencies by rate."""
    by_rate = sorted(trials, key=lambda trial: trial.rate)
    best = highest(trials)
    goals = ", ".join(str(each) for each in how.objectives)
    x = charts.Axis("requests sent per second", log=True)
    title = (
        f"Capacity: {best.rate:.3g} requests/s, {best.summary.output_tokens_per_s:,.0f} tokens/s"
    )
    with charts.figure(path, 3, f"{title} ({how.share:.0%} with {goals})") as (good, first, gaps):
        lines = {
            "sent": [(t.rate, t.rate) for t in by_rate],
            "answered": [(t.rate, t.summary.requests_per_s) for t in by_rate],
            "good": [(t.rate, t.summary.goodput_per_s) for t in by_rate],
        }
        y = charts.Axis("requests a second")
        charts.draw_lines(good, "goodput", x, y, lines)
        for axes, kind, name in (
            (first, "ttft", "time to first token"),
            (gaps, "itl", "between tokens"),
        ):
            percentiles = {
                p: [
                    (t.rate, 1e3 * t.summary.percentiles[kind][p])
                    for t in by_rate
                    if kind in t.summary.percentiles
                ]
                for p in ("p50", "p95", "p99")
            }
            percentiles = {p: points for p, points in percentiles.items() if points}
            charts.draw_lines(axes, name, x, charts.Axis("ms", log=True), percentiles)
            for each in how.objectives:
                if each.kind == kind:
                    axes.axhline(1e3 * each.most_s, color=charts.GREY, linestyle="--")
        for axes in (good, first, gaps):
            axes.axvline(best.rate, color=charts.GREEN, linestyle=":")


async def _capacity(
    url: str, access: Access, load: Workload, how: Search, seed: int
) -> list[Trial]:
    async with target(url, access, load.sessions) as server:
        await warm_up(server, load)
        return await search(server, load, how, seed)


def capacity(
    url: options.Url,
    slo: options.Objectives = None,
    attainment: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the requests that must meet them.")
    ] = 0.95,
    rate: Annotated[float, typer.Option(min=0.001, help="The first, requests a second.")] = 1.0,
    most_rate: Annotated[
        float | None, typer.Option(min=0.001, help="The last; without it, until one fails.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of a trial.")] = 20.0,
    fewest: Annotated[int, typer.Option(min=1, help="Minimum requests per trial.")] = 20,
    precision: Annotated[
        float, typer.Option(min=0.01, help="Precision of the rate, as a fraction.")
    ] = 0.1,
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
    """Find the highest Poisson rate at which requests keep to the objectives, by bisection."""
    goals = options.objectives(slo or ["ttft=1s", "itl=100ms"])
    load = options.workload(prompt, output, file, sessions, resume, zipf)
    access = Access(endpoint, model, key, ignore_eos, timeout_s)
    most = math.inf if most_rate is None else most_rate
    how = Search(goals, attainment, rate, seconds, fewest, most, precision)
    if out is not None:
        charts.require()
    trials = asyncio.run(_capacity(url, access, load, how, seed))
    best = highest(trials)
    end = ", and no higher rate was to be tried" if best.rate >= most else ""
    show_summary(f"{url}: {best.rate:.3g} requests/s hold{end}", best.summary)
    if out is not None:
        found = [{"rate": t.rate, "holds": t.holds, "summary": t.summary.to_json()} for t in trials]
        write_result(out, {"rate": best.rate, "attainment": attainment, "trials": found})
        draw(out / f"capacity.{'svg' if svg else 'png'}", trials, how)
