"""The search for a capacity ends at it, whatever the first rate."""

import asyncio
from typing import Any

import pytest

from loadtest import capacity
from loadtest.capacity import Search, highest, search
from loadtest.client import Sample
from loadtest.measures import Objective
from loadtest.workload import Lengths, Workload

LOAD = Workload(Lengths.parse("1"), Lengths.parse("1"))


def how(first: float, most: float = float("inf")) -> Search:
    goals = [Objective.parse("ttft=1s")]
    return Search(goals, share=0.95, first=first, seconds=1, fewest=1, most=most, precision=0.1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that answers 37 requests a second in time, and of more none."""

    async def run(*_: object, rate: float, **__: object) -> list[Sample]:
        ttft = 0.5 if rate <= 37 else 2.0
        return [Sample(0, 0, [ttft, ttft + 0.1], ttft + 0.1, 1, 2)]

    monkeypatch.setattr(capacity, "run", run)
    return None


@pytest.mark.parametrize("first", [1, 30, 37, 38, 200, 1000])
def test_the_search_ends_next_to_the_capacity(server: Any, first: float) -> None:
    trials = asyncio.run(search(server, LOAD, how(first), seed=0))
    assert 37 / 1.1 <= highest(trials).rate <= 37
    assert min(trial.rate for trial in trials if not trial.holds) <= 37 * 1.1


@pytest.mark.parametrize(("first", "most", "found"), [(1, 3, 3), (16, 20, 20), (50, 5, 5)])
def test_the_search_goes_no_further_than_it_may(
    server: Any, first: float, most: float, found: float
) -> None:
    trials = asyncio.run(search(server, LOAD, how(first, most), seed=0))
    assert highest(trials).rate == found
    assert all(trial.rate <= most for trial in trials)


def test_a_rate_that_nobody_reaches_is_an_error(server: Any) -> None:
    with pytest.raises(RuntimeError, match="lower --rate"):
        asyncio.run(search(server, LOAD, how(100_000), seed=0))
