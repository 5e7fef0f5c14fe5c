"""Plot results of `train`, `trial`, `context` and `recall` over a logarithmic axis.

python -m model.training.chart context.jsonl context.svg
"""

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from model.files import write_file

WIDTH, HEIGHT, LEFT, TOP, RIGHT = 460, 260, 60, 40, 240
"""Sizes of the axes and margins, in pixels; line names are on the right."""

FIRST_POSITION = 64
"""The bits per byte of earlier ones are those of a few tokens, and would set the scale."""

COLOURS = ("#159", "#c55", "#284", "#a6c", "#c82", "#555")
TEXT = "font-family='sans-serif' font-size='13'"

Line = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart: named lines of points (x > 0, y >= least)."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]
    least: float = 0.0
    """Where the vertical axis starts."""


def chart(results: Sequence[Line], gap: int = 0) -> Chart:
    """Chart of results, all of one task. Raises ValueError otherwise.

    `gap`: of associative recall, the one shown.
    """
    tasks = {line.get("task", "context") for line in results}
    if len(tasks) != 1:
        raise ValueError(f"results of one task make a chart, not of {sorted(tasks)}")
    (task,) = tasks
    if task == "context":
        lines = {
            f"pieces of {line['piece_tokens']:,}" if line["piece_tokens"] else "one session": [
                (end, value) for end, value in line["by_position"] if end >= FIRST_POSITION
            ]
            for line in results
        }
        return Chart("bits per byte by position in a session", "tokens", "bits per byte", lines)
    if task == "training":
        return Chart("bits per byte while training", "tokens", "bits per byte", _held_out(results))
    if task == "trial":
        losses = _losses(results)
        least = math.floor(min((y for line in losses.values() for _, y in line), default=0.0))
        return Chart("loss while training", "tokens", "nats per token", losses, least)
    found = [(_network(line), each) for line in results for each in line["found"]]
    if task == "associative":
        pairs = ((name, x["pairs"], x["accuracy"]) for name, x in found if x["gap"] == gap)
        title = f"multi-query associative recall, {gap} fillers before the questions"
        return Chart(title, "pairs", "accuracy", _means(pairs))
    lengths = ((name, each["length"], each["accuracy"]) for name, each in found)
    title = f"passkey, trained at up to {results[0]['trained_length']} tokens"
    return Chart(title, "tokens, all depths", "accuracy", _means(lengths))


def _held_out(results: Sequence[Line]) -> dict[str, Points]:
    """Bits per byte of each held-out file by tokens, those of the runs before included."""
    lines: dict[str, Points] = defaultdict(list)
    before = 0
    for _, run in itertools.groupby(results, lambda line: line["run"]):
        points = list(run)
        for line in points:
            for file, value in line["bits_per_byte"].items():
                lines[file].append((before + line["tokens"], value))
        before += points[-1]["tokens"]
    return lines


def _losses(results: Sequence[Line]) -> dict[str, Points]:
    """Loss of each variant by tokens, both the means of all seeds."""
    seeds: dict[str, list[Points]] = defaultdict(list)
    for line in results:
        seeds[line["variant"]].append(line["losses"])
    return {
        name: [tuple(map(mean, zip(*points, strict=True))) for points in zip(*of, strict=False)]
        for name, of in seeds.items()
    }


def _network(line: Line) -> str:
    return f"{line['variant']}, d_k {line['d_key']}"


def _means(found: Iterable[tuple[str, float, float]]) -> dict[str, Points]:
    """Named lines of the mean y for each x."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, x, y in found:
        values[name][x].append(y)
    return {name: [(x, mean(ys)) for x, ys in sorted(of.items())] for name, of in values.items()}


def draw(made: Chart) -> str:
    """SVG of the chart. Raises ValueError if it has no points."""
    points = [point for line in made.lines.values() for point in line]
    if not points:
        raise ValueError("there are no results to draw")
    first, last = (f(math.log2(x) for x, _ in points) for f in (min, max))
    span, height = max(last - first, 1.0), max(y for _, y in points) - made.least or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + WIDTH * (math.log2(x) - first) / span,
            TOP + HEIGHT * (1 - (y - made.least) / height),
        )

    bottom = TOP + HEIGHT
    parts = []
    for part in range(5):
        value = made.least + height * part / 4
        _, y = place(2**first, value)
        parts.append(
            f"<path d='M{LEFT} {y:.1f}h{WIDTH}' stroke='#ddd'/><text x='{LEFT - 8}' y='{y + 4:.1f}'"
            f" {TEXT} text-anchor='end' fill='#666'>{value:.2f}</text>"
        )
    for power in range(math.ceil(first), math.floor(first + span) + 1, max(1, round(span / 6))):
        x, _ = place(2**power, 0)
        parts.append(
            f"<text x='{x:.1f}' y='{bottom + 20}' {TEXT} text-anchor='middle' fill='#666'>"
            f"{2**power:,}</text>"
        )
    for number, (name, line) in enumerate(made.lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], 4 * (number // len(COLOURS))
        y = TOP + 12 + 20 * number
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'"
            f" stroke-dasharray='{dash or 'none'}'/>"
            f"<text x='{LEFT + WIDTH + 12}' y='{y}' {TEXT} fill='{colour}'>{escape(name)}</text>"
        )
    size = f"{LEFT + WIDTH + RIGHT} {bottom + 50}"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size}'>",
            "<rect width='100%' height='100%' fill='white'/>",
            f"<text x='{LEFT}' y='22' {TEXT} font-weight='bold'>{escape(made.title)}</text>",
            f"<text x='{LEFT + WIDTH}' y='{bottom + 40}' {TEXT} text-anchor='end' fill='#666'>"
            f"{escape(made.x)}; vertical: {escape(made.y)}</text>",
            *parts,
            "</svg>\n",
        ]
    )


def main(
    results: Annotated[Path, typer.Argument(help="Lines of JSON of one task.")],
    out: Annotated[Path, typer.Argument(help="SVG file to write.")],
    gap: Annotated[int, typer.Option(help="Of associative recall, the one shown.")] = 0,
) -> None:
    """Plot results."""
    try:
        lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
        picture = draw(chart(lines, gap))
    except (OSError, ValueError, KeyError) as error:
        reason = f"a line has no {error}" if isinstance(error, KeyError) else error
        print(f"error: {reason}", file=sys.stderr)
        raise typer.Exit(1) from error
    write_file(out, picture.encode())


if __name__ == "__main__":
    typer.run(main)
