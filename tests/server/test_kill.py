"""Killing servers loses nothing, and the proof of it would see it if it did."""

from pathlib import Path

import pytest

from loadtest import kill_sessions
from loadtest.kill_client import Seen, World
from loadtest.kill_player import Verdict, judge


def seen(turn: int, *kept: int) -> Seen:
    return Seen(turn, 10 * turn, len(kept), tuple((t, 10 * t, 1000) for t in kept), None, "idle")


ONE, TWO, THREE = seen(1, 1), seen(2, 2, 1), seen(3, 3, 2, 1)


@pytest.mark.parametrize(
    ("before", "after", "found", "verdict"),
    [
        ({"a": TWO}, {"a": TWO}, {"a": TWO}, "as acknowledged"),
        ({"a": TWO}, {"a": THREE}, {"a": TWO}, "as acknowledged"),
        ({"a": TWO}, {"a": THREE}, {"a": THREE}, "committed"),
        ({"a": THREE}, {"a": ONE}, {"a": ONE}, "committed"),
        ({"a": TWO}, {}, {}, "committed"),
        ({}, {"a": ONE}, {"a": ONE}, "committed"),
        ({"a": TWO}, {"a": TWO}, {"a": ONE}, "lost"),
        ({"a": TWO}, {"a": THREE}, {"a": ONE}, "lost"),
        ({"a": TWO}, {"a": THREE}, {}, "lost"),
        ({"a": TWO, "b": ONE}, {"b": ONE}, {}, "lost"),
        ({"a": TWO}, {"a": TWO}, {"a": THREE}, "half applied"),
        ({"a": TWO}, {"a": THREE}, {"a": seen(3, 2, 1)}, "half applied"),
        ({"a": THREE}, {"a": ONE}, {"a": TWO}, "half applied"),
        ({"a": THREE}, {"a": ONE}, {"a": seen(1, 3, 2, 1)}, "half applied"),
        ({}, {"a": ONE}, {"a": seen(0)}, "half applied"),
        ({"a": TWO}, {}, {"a": seen(2)}, "half applied"),
    ],
)
def test_a_crash_leaves_a_step_undone_or_done(
    before: World, after: World, found: World, verdict: Verdict
) -> None:
    assert judge(before, after, found) == verdict


@pytest.mark.long
def test_nothing_is_lost_when_servers_are_killed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tally = kill_sessions.run(tiny_checkpoint, tmp_path, kills=6, sessions=16, seed=1)
    assert tally.problems == []
    assert tally.acknowledged["turns"] > 50
    assert tally.in_flight["turns"] > 10
    assert tally.states_compared > 20
