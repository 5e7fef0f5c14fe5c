"""Results become lines at the right positions."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from model.training import chart
from model.training.chart import HEIGHT, LEFT, TOP, WIDTH, Chart, draw

CONTEXT: list[dict[str, Any]] = [
    {"piece_tokens": None, "by_position": [(1, 9.0), (64, 4.0), (128, 2.0), (256, 1.0)]},
    {"piece_tokens": 1024, "by_position": [(32, 8.0), (64, 4.0), (256, 3.0)]},
]
NETWORK = {"variant": "a < b", "d_key": 8}


def test_a_session_is_a_line_by_position() -> None:
    made = chart.chart(CONTEXT)
    assert made.lines == {
        "one session": [(64, 4.0), (128, 2.0), (256, 1.0)],
        "pieces of 1,024": [(64, 4.0), (256, 3.0)],
    }


def test_seeds_and_depths_are_averaged() -> None:
    values = [(16, 3, 0.4), (4, 3, 1.0), (16, 3, 0.6), (4, 7, 0.1)]
    found = [{"pairs": n, "gap": gap, "accuracy": value} for n, gap, value in values]
    made = chart.chart([{"task": "associative", **NETWORK, "found": found}], gap=3)
    assert made.lines == {"a < b, d_k 8": [(4, 1.0), (16, 0.5)]}
    assert "3" in made.title
    found = [{"length": 8, "depth": d, "accuracy": d} for d in (0.0, 1.0)]
    made = chart.chart([{"task": "passkey", **NETWORK, "trained_length": 9, "found": found}])
    assert made.lines == {"a < b, d_k 8": [(8, 0.5)]}
    assert "9" in made.title


def test_stages_of_a_training_follow_each_other() -> None:
    values = [("p", 10, 3.0), ("p", 20, 2.0), ("q", 25, 1.5), ("q", 35, 1.0)]
    saved = [
        {"task": "training", "run": run, "tokens": tokens, "bits_per_byte": {"a": y, "b": 2 * y}}
        for run, tokens, y in values
    ]
    points = [(10.0, 3.0), (20.0, 2.0), (45.0, 1.5), (55.0, 1.0)]
    assert chart.chart(saved).lines == {"a": points, "b": [(x, 2 * y) for x, y in points]}


def test_losses_of_a_trial_are_averaged_point_by_point() -> None:
    seeds = [
        ("x", [(10, 4.0), (20, 3.0)]),
        ("y", [(10, 2.5)]),
        ("x", [(12, 5.0), (22, 4.0), (30, 3.0)]),
    ]
    made = chart.chart([{"task": "trial", "variant": x, "losses": y} for x, y in seeds])
    assert made.lines == {"x": [(11, 4.5), (21, 3.5)], "y": [(10, 2.5)]}
    assert made.least == 2


@pytest.mark.parametrize("least", [0.0, 3.0])
def test_points_stand_where_their_numbers_say(least: float) -> None:
    values = [(1.0, least + 4.0), (2.0, least + 2.0), (4.0, least)]
    made = Chart("t < u", "x", "y", {"a < b": values}, least)
    root = ElementTree.fromstring(draw(made))
    (line,) = [each for each in root if each.tag.endswith("polyline")]
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points == [
        (LEFT, TOP),
        (LEFT + WIDTH / 2, TOP + HEIGHT / 2),
        (LEFT + WIDTH, TOP + HEIGHT),
    ]
    texts = {each.text for each in root}
    assert {"t < u", "a < b", "1", "2", "4", f"{least:.2f}", f"{least + 4:.2f}"} <= texts


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([*CONTEXT, {"task": "passkey"}], "results of one task make a chart"),
        ([{"piece_tokens": None, "by_position": []}], "no results to draw"),
        ([{"task": "trial", "variant": "paper"}], "a line has no 'losses'"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(
    lines: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    application = typer.Typer()
    application.command()(chart.main)
    arguments = [str(results), str(tmp_path / "out.svg")]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    failed = CliRunner().invoke(application, arguments)
    assert failed.exit_code == 1
    assert reason in failed.stderr
    results.write_text("".join(json.dumps(line) + "\n" for line in CONTEXT), "utf-8")
    assert CliRunner().invoke(application, arguments).exit_code == 0
    assert (tmp_path / "out.svg").read_text("utf-8").startswith("<svg")
