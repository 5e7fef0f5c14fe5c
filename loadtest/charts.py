"""Charts of results. They need matplotlib: pip install 'latentd[loadtest]'."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import typer

from loadtest.client import Sample
from loadtest.measures import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter

Format = Literal["png", "svg"]
Points = Sequence[tuple[float, float]]

BLUE, RED, GREEN, GREY, ORANGE = "#115599", "#cc5555", "#228844", "#777777", "#cc8822"
COLOURS = (BLUE, RED, GREEN, ORANGE, "#aa66cc", GREY)
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.prop_cycle": COLOURS,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "latentd",  # reproducible files
    "legend.frameon": False,
}


def require() -> None:
    """Exit with one line if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        typer.echo("charts need matplotlib: pip install 'latentd[loadtest]'", err=True)
        raise typer.Exit(1) from None


@contextmanager
def figure(path: Path, columns: int, title: str, *, rows: int = 1) -> Iterator[list["Axes"]]:
    """A figure with axes side by side, written at the end of the context."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        made = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False)
        made.suptitle(title, fontweight="bold")
        yield list(axes.flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        still = {"Date": None} if path.suffix == ".svg" else {}
        made.savefig(path, dpi=130, metadata=still)


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False


def draw_lines(
    axes: "Axes", title: str, x: Axis, y: Axis, lines: Mapping[str, Points], marker: str = "o"
) -> None:
    """Draw lines of points, with a legend if there are several."""
    for name, points in lines.items():
        at, values = zip(*points, strict=True)
        axes.plot(at, values, marker=marker, markersize=4, label=name)
    _label(axes, title, x, y)
    if len(lines) > 1:  # below the axes, where it covers nothing
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


def plain() -> "FuncFormatter":
    """A formatter of numbers without exponents."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.10g}")


def _label(axes: "Axes", title: str, x: Axis, y: Axis) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    if x.log:
        axes.set_xscale("log")
    if y.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    for axis, given in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_formatter(plain())
        if given.log:
            low, high = axis.get_view_interval()
            axis.set_minor_formatter(NullFormatter() if high > 10 * low else plain())


def draw_bench(
    path: Path, title: str, samples: Sequence[Sample], objectives: Sequence[Objective]
) -> None:
    """Distributions of TTFT, gaps and whole answers, and events over time."""
    whole = [sample for sample in samples if sample.error is None]
    kinds = {
        "ttft": ("time to first token", [s.ttft for s in whole if s.ttft is not None]),
        "itl": ("between tokens", [gap for s in whole for gap in s.gaps]),
        "e2e": ("whole answers", [s.e2e for s in whole]),
    }
    most = {each.kind: each.most_s for each in objectives}
    with figure(path, 2, title, rows=2) as (*spreads, over_time):
        for axes, (kind, (name, values)) in zip(spreads, kinds.items(), strict=True):
            if values:
                _cumulative(axes, values, most.get(kind))
            _label(axes, name, Axis("ms", log=True), Axis("share of all, %"))
        _over_time(over_time, samples)


def _cumulative(axes: "Axes", values: Sequence[float], objective_s: float | None) -> None:
    ms = 1e3 * np.sort(values)
    axes.plot(ms, np.linspace(0, 100, len(ms)), color=BLUE)
    for percent, colour in ((50, GREEN), (95, ORANGE), (99, RED)):
        at = float(np.percentile(ms, percent))
        axes.plot([at], [percent], "o", color=colour, label=f"p{percent}: {at:,.3g} ms")
    if objective_s is not None:
        label = f"objective: {1e3 * objective_s:g} ms"
        axes.axvline(1e3 * objective_s, color=GREY, linestyle="--", label=label)
    axes.legend(loc="lower right")


def _over_time(axes: "Axes", samples: Sequence[Sample]) -> None:
    began = min(sample.intended for sample in samples)
    whole = [sample for sample in samples if sample.error is None and sample.ttft is not None]
    for is_resumed, name, colour in ((False, "new", BLUE), (True, "resumed", GREEN)):
        shown = [sample for sample in whole if sample.is_resumed == is_resumed]
        if shown:
            at = [sample.intended - began for sample in shown]
            ttft = [1e3 * (sample.ttft or 0) for sample in shown]
            axes.plot(at, ttft, ".", color=colour, label=name, alpha=0.6)
    failed = [sample.intended - began for sample in samples if sample.error is not None]
    if failed:
        axes.plot(failed, [0] * len(failed), "x", color=RED, label="failed", clip_on=False)
    _label(axes, "time to first token, over time", Axis("s"), Axis("ms"))
    axes.legend(loc="upper right")
