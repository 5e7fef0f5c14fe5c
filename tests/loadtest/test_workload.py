"""A load depends only on its seed, and follows its description."""

import random
import statistics
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from loadtest.workload import Lengths, Request, Workload, arrivals, read_requests


@pytest.mark.parametrize(
    ("text", "median"),
    [
        ("40", 40),
        ("constant:40", 40),
        ("uniform:20:60", 40),
        ("normal:40:8", 40),
        ("lognormal:40:0.5", 40),
    ],
)
def test_lengths_have_their_distribution(text: str, median: int) -> None:
    lengths, chance = Lengths.parse(text), random.Random(0)
    drawn = [lengths.draw(chance) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(median, rel=0.05)
    assert min(drawn) >= 1
    assert (len(set(drawn)) == 1) == ("40" in text.split(":")[-1:])


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-3", "uniform:5", "uniform:9:3", "normal:5:-1", "pareto:1:2", "nan"]
)
def test_a_bad_distribution_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=text.split(":")[0] or "''"):
        Lengths.parse(text)


def test_a_load_is_the_same_each_time() -> None:
    load = Workload(Lengths.parse("uniform:1:9"), Lengths.parse("5"), sessions=3, resumed=0.5)
    first, again, other = (list(islice(load.requests(seed), 50)) for seed in (0, 0, 1))
    assert first == again != other


def test_popular_sessions_are_resumed_more_often() -> None:
    load = Workload(Lengths.parse("3"), Lengths.parse("5"), sessions=10, resumed=0.8, zipf=1.0)
    ranks = Counter(request.rank for request in islice(load.requests(0), 20_000))
    assert ranks[None] / 20_000 == pytest.approx(0.2, rel=0.1)
    assert ranks[0] / ranks[1] == pytest.approx(2, rel=0.15)
    assert ranks[0] / ranks[4] == pytest.approx(5, rel=0.15)
    assert set(ranks) == {None, *range(10)}


def test_arrivals_are_poisson() -> None:
    at = arrivals(rate=20, count=5000, seed=0)
    gaps = [b - a for a, b in zip([0.0, *at], at, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.05)


def test_requests_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text('{"prompt": "a", "output_tokens": 7}\n\n{"messages": [{"role": "user"}]}\n')
    given = read_requests(file, Lengths.parse("5"))
    assert given == (Request("a", 7), Request([{"role": "user"}], 5))
    load = Workload(Lengths.parse("1"), Lengths.parse("1"), given)
    assert list(islice(load.requests(0), 3)) == [*given, given[0]]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "{}", '{"prompt": ""}', '{"prompt": "a", "output_tokens": 0}']
)
def test_a_bad_line_of_a_file_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_requests(file, Lengths.parse("5"))


def test_prompts_of_token_ids_have_their_length() -> None:
    load = Workload(Lengths.parse("7"), Lengths.parse("5"), below=30)
    for request in islice(load.requests(0), 50):
        body = request.body("completions", None, ignore_eos=True, temperature=0.0)
        assert len(body["prompt"]) == 7
        assert 1 <= min(body["prompt"]) <= max(body["prompt"]) < 30
        assert body["temperature"] == 0
        with pytest.raises(ValueError, match="completions"):
            request.body("chat", None, ignore_eos=True)
