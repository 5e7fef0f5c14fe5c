"""What the clients of `kill_sessions` do: scripts that depend on nothing but a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KEEP_TURNS = 4
"""Of the servers, so that turns also erase checkpoints."""

MAIN, FORK = "main", "fork"
"""Names of a client's sessions; each has at most these two at a time."""

TEXT = "the cat sat on a mat and then it saw two small dogs who ran to see an old red hat"
WORDS = TEXT.split()
STOPS = (["at"], [" th", "e"], ["qu", "\n"])


@dataclass(frozen=True)
class Create:
    name: str


@dataclass(frozen=True)
class Take:
    """A turn; `body` is what is asked for, without the session."""

    name: str
    turn: int
    """The one that the session is at before."""

    body: dict[str, Any]


@dataclass(frozen=True)
class Rewind:
    name: str
    turn: int


@dataclass(frozen=True)
class Fork:
    """`name` begins where `source` was after this turn."""

    name: str
    source: str
    turn: int


@dataclass(frozen=True)
class Delete:
    name: str


Step = Create | Take | Rewind | Fork | Delete


@dataclass
class _Outline:
    """What the script knows of a session, to ask only for what is possible."""

    turn: int = 0
    kept: dict[int, bool] = field(default_factory=lambda: {0: False})
    """Turns that can be gone back to; whether an empty prompt goes on from there."""

    def taken(self, goes_on: bool) -> None:
        self.turn += 1
        self.kept[self.turn] = goes_on
        for turn in [t for t in self.kept if 0 < t <= self.turn - KEEP_TURNS]:
            del self.kept[turn]

    def back_to(self, turn: int) -> None:
        self.turn = turn
        self.kept = {t: goes_on for t, goes_on in self.kept.items() if t <= turn}


def script(seed: int, client: int) -> list[Step]:
    """All that a client does from the creation of its session to the end of the last one."""
    return list(_steps(random.Random(f"{seed}/{client}")))


def _steps(chance: random.Random) -> Iterator[Step]:
    sessions = {MAIN: _Outline()}

    def turns(fewest: int, most: int) -> Iterator[Step]:
        for _ in range(chance.randint(fewest, most)):
            name = chance.choice(list(sessions))
            yield _turn(chance, name, sessions[name])

    yield Create(MAIN)
    yield from turns(3, 6)
    for _ in range(chance.choice((0, 1, 1, 2))):
        main = sessions[MAIN]
        earlier = [turn for turn in main.kept if turn < main.turn]
        if earlier:
            main.back_to(chance.choice(earlier))
            yield Rewind(MAIN, main.turn)
            yield from turns(1, 3)
    if chance.random() < 0.6:
        start = chance.choice(list(sessions[MAIN].kept))
        sessions[FORK] = _Outline(start, {0: False, start: sessions[MAIN].kept[start]})
        yield Fork(FORK, MAIN, start)
        yield from turns(3, 6)
    while sessions:
        name = chance.choice(list(sessions))
        del sessions[name]
        yield Delete(name)
        if sessions:
            yield from turns(1, 2)


def _turn(chance: random.Random, name: str, session: _Outline) -> Take:
    body: dict[str, Any] = {
        "prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 30))),
        "max_tokens": chance.randint(5, 60),
        "seed": chance.getrandbits(63),
        "temperature": chance.choice((0.0, 0.7, 1.0, 1.6)),
        "ignore_eos": chance.random() < 0.8,
    }
    kind = chance.random()
    if kind < 0.25 and session.kept[session.turn]:
        body["prompt"] = ""
    elif kind < 0.3:
        body["prompt"] = " ".join(chance.choices(WORDS, k=chance.randint(100, 1000)))
    elif kind < 0.35:
        body["max_tokens"] = 0
    if chance.random() < 0.4:
        body |= {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    if chance.random() < 0.3:
        body |= {"top_p": 0.9, "top_k": 50}
    if chance.random() < 0.15:
        body["stop"] = chance.choice(STOPS)
    if chance.random() < 0.7:
        body |= {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    take = Take(name, session.turn, body)
    session.taken(body["ignore_eos"] and "stop" not in body and body["max_tokens"] > 0)
    return take
