"""Tokens per second that HTTP delivers over SSE, independent of the engine.

    python -m loadtest front --rate 100000 --api-workers 4

The real server with a stand-in engine (`loadtest.front_server`), read by clients in separate
processes. Shows the delivered and emitted rates, and the CPU time per token of each process, which
gives the number of cores for a rate; on a machine with too few cores the CPU time, not the rate, is
the result.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from loadtest.front_client import PATHS, Report
from loadtest.processes import started

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU time so far."""

    loop: float
    """The core's main thread, which runs its event loop."""

    engine: float
    """The core's other threads."""

    fronts: float

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(self.loop - other.loop, self.engine - other.engine, self.fronts - other.fronts)


def _cpu_s(stat: Path) -> float:
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def cpu(pid: int) -> Cpu:
    """CPU time of a server, from /proc."""
    process = Path(f"/proc/{pid}")
    children = [
        child for task in process.glob("task/*/children") for child in task.read_text().split()
    ]
    loop = _cpu_s(process / f"task/{pid}/stat")
    return Cpu(
        loop=loop,
        engine=_cpu_s(process / "stat") - loop,
        fronts=sum(_cpu_s(Path(f"/proc/{child}/stat")) for child in children),
    )


@contextmanager
def server(streams: int, rate: float, *flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server with the stand-in engine on a free port."""
    sizes = str(streams), str(rate)
    with started("loadtest.front_server", *sizes, "--log-level", "warning", *flags) as found:
        yield found.port, found.process


def measure(
    port: int,
    process: subprocess.Popen[str],
    endpoint: str,
    streams: int,
    tokens: int,
    clients: int,
) -> tuple[float, Cpu, list[Report]]:
    """One run: the emitted rate, its CPU time, and the clients' reports."""
    shares = [streams // clients + (i < streams % clients) for i in range(clients)]
    readers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "loadtest.front_client"),
                *(str(port), endpoint, str(share), str(tokens)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    for reader in readers:
        if reader.stdout is None or reader.stdout.readline() != "ready\n":
            raise RuntimeError("a client did not get its streams")
    before = cpu(process.pid)
    outputs = [reader.communicate()[0] for reader in readers]
    spent = cpu(process.pid) - before
    if any(reader.returncode for reader in readers):
        raise RuntimeError("a client failed")
    emitted = process.stdout.readline() if process.stdout is not None else ""
    return float(emitted.split()[1]), spent, [Report(**json.loads(line)) for line in outputs]


def show(name: str, emitted: float, spent: Cpu, reports: list[Report]) -> None:
    """One line of the table."""
    tokens = sum(report.tokens for report in reports)
    delivered = tokens / max(report.seconds for report in reports)
    delays = sorted(delay for report in reports for delay in report.delays_ms)
    per_token = [
        1e6 * seconds / tokens
        for seconds in (
            *(spent.loop, spent.engine, spent.fronts),
            sum(report.cpu_s for report in reports),
        )
    ]
    print(
        f"{name:22}{emitted:10,.0f}{delivered:11,.0f}{delivered / emitted:7.2f}"
        f"{tokens / sum(report.events for report in reports):8.2f}"
        + "".join(f"{cost:8.1f}" for cost in per_token)
        + f"{statistics.median(delays):9.1f}{delays[int(0.99 * len(delays))]:9.1f}",
        flush=True,
    )


def main(
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per stream.")] = 400,
    rate: Annotated[list[float] | None, typer.Option(help="Emitted tokens per second.")] = None,
    api_workers: Annotated[list[int] | None, typer.Option(help="As for latentd serve.")] = None,
    endpoint: Annotated[list[str] | None, typer.Option(help="completions, chat.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
) -> None:
    """Print a table: tokens per second, microseconds of CPU per token, milliseconds of delay."""
    print(f"{streams} streams of {tokens} tokens, {os.cpu_count()} cores, {clients} clients")
    print(
        f"{'':22}{'emitted':>10}{'delivered':>11}{'ratio':>7}{'tokens':>8}"
        f"{'CPU of':>8}{'the':>8}{'the':>8}{'the':>8}{'delay':>9}{'delay':>9}"
    )
    print(
        f"{'':22}{'/s':>10}{'/s':>11}{'':7}{'/event':>8}"
        f"{'loop':>8}{'engine':>8}{'fronts':>8}{'clients':>8}{'p50':>9}{'p99':>9}"
    )
    for workers in api_workers or [1]:
        flags = [] if workers == 1 else ["--api-workers", str(workers)]
        for per_s in rate or [10_000.0]:
            with server(streams, per_s, *flags) as (port, process):
                for name in endpoint or list(PATHS):
                    measure(port, process, name, streams, 20, clients)
                    show(
                        f"{name}, {workers} worker{'s' * (workers > 1)}",
                        *measure(port, process, name, streams, tokens, clients),
                    )
