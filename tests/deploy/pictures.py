"""Plot Prometheus' results for the dashboard's queries on a server with clients.

    python -m tests.deploy.pictures [SECONDS]

Writes docs/dashboard.svg: the data of the panels, not Grafana's rendering. Lines that are always 0
are omitted if there are others.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

from tests.deploy.monitored import Prometheus, dashboard_queries, monitored
from tests.deploy.programs import ROOT

COLOURS = ("#3274d9", "#e0752d", "#299c46", "#a352cc", "#c4162a", "#8a8a8a")
WIDTH, HEIGHT, GAP = 300, 120, 24
COLUMNS = 3
UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))

Line = tuple[str, list[tuple[float, float]]]


def number(value: float, unit: str) -> str:
    """A number with an SI prefix, as in 12.3 ms."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    prefix, size = next((each for each in UNITS if value >= each[1]), ("", 1.0))
    return f"{value / size:.3g} {prefix}{ {'s': 's', 'bytes': 'B'}.get(unit, '') }".strip()


def panels(prometheus: Prometheus) -> Iterator[tuple[str, str, list[Line]]]:
    """Title, unit and lines of each panel."""
    titles: dict[str, tuple[str, list[Line]]] = {}
    for query in dashboard_queries():
        lines = titles.setdefault(query.where, (query.unit, []))[1]
        for labels, points in prometheus.series(query):
            name = query.legend
            for label, value in labels.items():
                name = name.replace(f"{{{{{label}}}}}", value)
            lines.append((name, points))
    for title, (unit, lines) in titles.items():
        yield title, unit, [line for line in lines if any(value for _, value in line[1])] or lines


def draw(title: str, unit: str, lines: list[Line]) -> Iterator[str]:
    """The elements of one panel, whose upper left corner is at 0, 0."""
    times = [when for _, points in lines for when, _ in points]
    first, last = min(times), max(max(times), min(times) + 1)
    most = max(value for _, points in lines for _, value in points)
    yield f"<text y='12' font-weight='bold'>{escape(title)}</text>"
    yield f"<text x='{WIDTH}' y='12' text-anchor='end'>up to {escape(number(most, unit))}</text>"
    yield f"<rect y='18' width='{WIDTH}' height='{HEIGHT}' fill='#f7f7f7'/>"
    wide, high = WIDTH / (last - first), HEIGHT / (most or 1)
    for (_, points), colour in zip(lines, COLOURS * 9, strict=False):
        marks = " ".join(
            f"{wide * (when - first):.1f},{18 + HEIGHT - high * value:.1f}"
            for when, value in points
        )
        yield f"<polyline points='{marks}' fill='none' stroke='{colour}' stroke-width='1.5'/>"
    names = "".join(
        f"<tspan fill='{colour}'>{escape(name)} </tspan>"
        for (name, _), colour in zip(lines, COLOURS * 9, strict=False)
    )
    yield f"<text y='{HEIGHT + 32}'>{names}</text>"


def picture(prometheus: Prometheus) -> str:
    """An SVG of all panels."""
    drawn = list(panels(prometheus))
    step_x, step_y = WIDTH + GAP, HEIGHT + 40 + GAP
    rows = -(-len(drawn) // COLUMNS)
    width, height = COLUMNS * step_x + GAP, rows * step_y + GAP
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        "font-family='sans-serif' font-size='11'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for position, (title, unit, lines) in enumerate(drawn):
        row, column = divmod(position, COLUMNS)
        parts.append(f"<g transform='translate({GAP + column * step_x},{GAP + row * step_y})'>")
        parts += [*draw(title, unit, lines), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    with tempfile.TemporaryDirectory() as folder, monitored(Path(folder)) as whole:
        time.sleep(seconds)
        (ROOT / "docs" / "dashboard.svg").write_text(picture(whole.prometheus))


if __name__ == "__main__":
    main()
