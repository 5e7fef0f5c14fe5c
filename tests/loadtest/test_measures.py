"""Summaries count correctly, and intervals have their coverage."""

import numpy as np
import pytest

from loadtest.client import Sample
from loadtest.measures import Objective, geometric_mean, slope, student_t, summarise


def sample(intended: float, *text_at: float, error: str | None = None) -> Sample:
    ended = text_at[-1] if text_at else intended + 1
    return Sample(intended, intended + 0.5, list(text_at), ended, 3, len(text_at), error=error)


def test_a_summary_counts_from_the_intended_moment() -> None:
    summary = summarise([sample(0, 1.0, 1.2, 1.4), sample(1, 3.0, 3.1, 3.2)], [])
    assert summary.percentiles["ttft"]["p50"] == pytest.approx(1.5)
    assert summary.percentiles["tpot"]["mean"] == pytest.approx(0.15)
    assert summary.percentiles["itl"]["mean"] == pytest.approx(0.15)
    assert summary.percentiles["e2e"]["p99"] == pytest.approx(2.2, rel=0.01)
    assert summary.seconds == pytest.approx(3.2)
    assert summary.output_tokens_per_s == pytest.approx(6 / 3.2)
    assert summary.late_p99_s == pytest.approx(0.5)


def test_goodput_needs_every_objective_and_an_end() -> None:
    samples = [
        sample(0, 0.1, 0.2),
        sample(0, 0.7, 0.8),
        sample(0, 0.1, 0.9),
        sample(0, 0.1, 0.2, error="timeout"),
        sample(0, error="429 queue_full"),
    ]
    goals = [Objective.parse("ttft=500ms"), Objective.parse("itl<=0.5s")]
    summary = summarise(samples, goals)
    assert (summary.good, summary.attainment) == (1, 0.2)
    assert summary.errors == {"timeout": 1, "429 queue_full": 1}
    assert summary.output_tokens == 6


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=1.2.3s", "late=5ms", "ttft=-1s"])
def test_a_bad_objective_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        Objective.parse(text)


@pytest.mark.parametrize(("freedom", "known"), [(1, 12.706), (2, 4.303), (9, 2.262), (100, 1.984)])
def test_quantiles_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert student_t(freedom) == pytest.approx(known, rel=2e-3)


@pytest.mark.long
def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    chance, x = np.random.default_rng(0), np.arange(240.0)
    ratios = slopes = 0
    for _ in range(400):
        found = geometric_mean(2 * np.exp(chance.normal(0, 0.2, 6)))
        ratios += found.low <= 2 <= found.high
        noise = np.convolve(chance.normal(size=246), np.ones(7) / 7, "valid")  # neighbours alike
        grown = slope(x, 0.01 * x + noise)
        slopes += grown.low <= 0.01 <= grown.high
    assert 0.91 < ratios / 400 < 0.99
    assert 0.88 < slopes / 400 < 0.99


def test_what_grows_is_seen_to_grow() -> None:
    x = np.arange(100.0)
    found = slope(x, 5 + 2 * x + np.random.default_rng(0).normal(size=100))
    assert 1.9 < found.low < found.value < found.high < 2.1
