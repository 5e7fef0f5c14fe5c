"""Results of killing servers."""

from collections import Counter
from dataclasses import dataclass, field

PROBLEMS = (
    *("lost", "half applied", "wrong text", "wrong state", "wrong replay", "came back"),
    *("refused", "wrong account", "wrong metrics", "damaged file"),
)


@dataclass
class Tally:
    """What happened, and every problem."""

    num_kills: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """Kills that hit at least one step in this phase, or none at all."""

    hits: Counter[str] = field(default_factory=Counter)
    """Steps in this phase when the server was killed."""

    acknowledged: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    committed: Counter[str] = field(default_factory=Counter)
    """Of the steps in flight, those found to be committed."""

    verified: Counter[str] = field(default_factory=Counter)
    """Objects found exactly as expected after restarts."""

    interrupted: int = 0
    """Background responses reported as failed after a kill."""

    replays: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Kind and details of each."""

    def count(self, kind: str) -> int:
        """Number of problems of this kind."""
        return sum(kind == found for found, _ in self.problems)


def report(tally: Tally) -> None:
    """Print what happened."""
    print(f"{tally.num_kills} kills; what they hit, as far as a client can tell:")
    for phase in sorted(tally.kills, key=lambda phase: -tally.hits[phase]):
        print(f"  {phase:22} {tally.kills[phase]:5} kills {tally.hits[phase]:6} steps")
    print(f"{'':22} {'acknowledged':>12} {'in flight':>10} {'of these committed':>19}")
    for kind in ("turns", "responses", "background responses", "other steps"):
        counts = (tally.acknowledged[kind], tally.in_flight[kind], tally.committed[kind])
        print("{:22} {:12,} {:10,} {:19,}".format(kind, *counts))
    print(f"background responses interrupted, and reported as failed: {tally.interrupted:,}")
    print(f"kept answers replayed: {tally.replays:,}")
    verified = (f"{count:,} {what}" for what, count in tally.verified.items())
    print(f"verified after restarts: {', '.join(verified)}")
    for kind in PROBLEMS:
        print(f"{kind}: {tally.count(kind)}")
    for kind, story in tally.problems:
        print(f"{kind}: {story[:2000]}")
