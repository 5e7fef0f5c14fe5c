"""Output of results: JSON with the machine and the command, and tables."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.measures import Summary
from server import __version__

console = Console()


def machine() -> dict[str, Any]:
    """The machine that was measured. `load` includes this program: check it before making
    claims."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def command() -> str:
    """What was called."""
    return shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])


def heading() -> str:
    """What was called, and where, for results that are text."""
    where = machine()
    return (
        f"{command()}\n{where['cores']} cores of {where['processor']}, {where['system']}, "
        f"load average {where['load_average'][0]:.1f}, {datetime.now(UTC):%Y-%m-%d}\n"
    )


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write `result.json` to the folder, which is created."""
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "command": command(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "latentd": __version__,
        "machine": machine(),
    }
    (out / "result.json").write_text(json.dumps(head | result, indent=2) + "\n")


def show_summary(title: str, summary: Summary) -> None:
    """Print a summary."""
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for name in ("mean", "p50", "p90", "p95", "p99"):
        table.add_column(name, justify="right")
    for kind, values in summary.percentiles.items():
        row = (f"{1e3 * values[name]:,.2f}" for name in ("mean", "p50", "p90", "p95", "p99"))
        table.add_row(kind, *row)
    console.print(table)
    console.print(
        f"{summary.requests:,} requests ({summary.resumed:,} resumed a session) in "
        f"{summary.seconds:.1f} s: {summary.requests_per_s:.2f} answers/s, "
        f"{summary.output_tokens_per_s:,.0f} output tokens/s"
    )
    if summary.objectives:
        console.print(
            f"goodput under {', '.join(summary.objectives)}: {summary.goodput_per_s:.2f} "
            f"requests/s, {summary.attainment:.1%} of all"
        )
    for kind, count in summary.errors.items():
        console.print(f"[red]{count:,} failed: {kind}", highlight=False)
