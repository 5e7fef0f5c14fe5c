"""Killing servers loses nothing, and the chaos test would detect it if it did."""

import asyncio
import itertools
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from loadtest.chaos import kill
from loadtest.chaos.look import INTERRUPTED, SeenResponse, SeenSession, Verdict, World, judge
from loadtest.chaos.tally import Tally
from tests.patience import PROGRAM_S


def seen(turn: int, *kept: int) -> SeenSession:
    return SeenSession(
        turn, 10 * turn, len(kept), tuple((t, 10 * t, 1000) for t in kept), None, "idle"
    )


ONE, TWO, THREE = seen(1, 1), seen(2, 2, 1), seen(3, 3, 2, 1)
WHOLE, CUT = SeenResponse("completed", "a text"), SeenResponse("completed", "a te")


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
        ({}, {"r": WHOLE}, {}, "as acknowledged"),
        ({}, {"r": WHOLE}, {"r": WHOLE}, "committed"),
        ({"r": WHOLE}, {}, {}, "committed"),
        ({"r": WHOLE}, {"r": WHOLE}, {}, "lost"),
        ({}, {"r": WHOLE}, {"r": CUT}, "half applied"),
        ({"r": WHOLE}, {"r": WHOLE}, {"r": INTERRUPTED}, "half applied"),
        ({}, {}, {"erased r": WHOLE}, "half applied"),
    ],
)
def test_a_crash_leaves_a_step_undone_or_done(
    before: World, after: World, found: World, verdict: Verdict
) -> None:
    assert judge(before, after, found) == verdict


@pytest.mark.long
def test_nothing_is_lost_when_servers_are_killed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    acknowledged = ("turns", "responses", "background responses")
    expected = Counter(
        {
            **{f"acknowledged {kind}": 5 for kind in acknowledged},
            **{f"verified {what}": 10 for what in ("sessions", "responses", "states")},
            "in flight": 10,
        }
    )
    found = Counter[str]()
    deadline = time.monotonic() + PROGRAM_S
    for seed in itertools.count():
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        tally = Tally()
        asyncio.run(
            kill.run(
                *(checkpoint, folder),
                kills=4,
                servers=2,
                clients=8,
                left=4,
                slow=1,
                seed=seed,
                tally=tally,
            )
        )
        assert tally.num_kills == 4
        assert tally.problems == []
        found.update({f"acknowledged {kind}": n for kind, n in tally.acknowledged.items()})
        found.update({f"verified {what}": n for what, n in tally.verified.items()})
        found["in flight"] += tally.in_flight.total()
        if found >= expected:
            break
        assert time.monotonic() < deadline, expected - found
