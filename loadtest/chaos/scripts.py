"""Scripts of the clients of `loadtest chaos`, determined by a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KEEP_TURNS = 4
"""Checkpoints per session, few so that turns also erase some."""

MAIN, FORK, BEGUN = "main", "fork", "begun"
"""Names of a client's sessions; the last one starts from a response."""

ENDLESS = 50_000
"""Maximum tokens of a response that is cancelled: more than it ever reaches."""

TEXT = "the cat sat on a mat and then it saw two small dogs who ran to see an old red hat"
WORDS = TEXT.split()
STOPS = (["at"], [" th", "e"], ["qu", "\n"])


@dataclass(frozen=True)
class Create:
    name: str


@dataclass(frozen=True)
class ScriptedTurn:
    """`body`: the request without the session."""

    name: str
    turn: int
    """The session's turn before it."""

    body: dict[str, Any]


@dataclass(frozen=True)
class Rewind:
    name: str
    turn: int


@dataclass(frozen=True)
class Fork:
    """`name` starts from `source` after this turn."""

    name: str
    source: str
    turn: int


@dataclass(frozen=True)
class Delete:
    name: str


@dataclass(frozen=True)
class Respond:
    """A stored response that continues a previous one or starts from nothing."""

    name: str
    previous: str | None
    body: dict[str, Any]
    is_cancelled: bool = False

    @property
    def is_background(self) -> bool:
        return bool(self.body.get("background"))


@dataclass(frozen=True)
class Begin:
    """A session that starts from a response."""

    name: str
    response: str


@dataclass(frozen=True)
class Erase:
    """Deletion of a stored response."""

    name: str


Step = Create | ScriptedTurn | Rewind | Fork | Delete | Respond | Begin | Erase


@dataclass
class _Outline:
    """The script's knowledge of a session, to request only what is possible."""

    turn: int = 0
    kept: dict[int, bool] = field(default_factory=lambda: {0: False})
    """Turns that can be rewound to; whether an empty prompt can continue there."""

    def advance(self, goes_on: bool) -> None:
        self.turn += 1
        self.kept[self.turn] = goes_on
        for turn in [t for t in self.kept if 0 < t <= self.turn - KEEP_TURNS]:
            del self.kept[turn]

    def back_to(self, turn: int) -> None:
        self.turn = turn
        self.kept = {t: goes_on for t, goes_on in self.kept.items() if t <= turn}


def script(seed: int, client: int) -> list[Step]:
    """All steps of a client from the creation of its first session to the deletion of the last."""
    chance = random.Random(f"{seed}/{client}")
    parts, steps = [_sessions(chance), _responses(chance)], list[Step]()
    while parts:
        part = chance.choice(parts)
        step = next(part, None)
        if step is None:
            parts.remove(part)
        else:
            steps.append(step)
    return steps


def _sessions(chance: random.Random) -> Iterator[Step]:
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


def _responses(chance: random.Random) -> Iterator[Step]:
    """A tree of responses, some of which are deleted early, and a session that starts from one."""
    names, usable = list[str](), list[str]()
    for number in range(chance.randint(5, 8)):
        previous = chance.choice([None, *usable, *usable[-1:]])
        step = _response(chance, f"response {number}", previous)
        yield step
        names.append(step.name)
        if not step.is_cancelled:
            usable.append(step.name)
        if len(names) > 2 and chance.random() < 0.3:
            erased = names.pop(chance.randrange(len(names)))
            usable = [name for name in usable if name != erased]
            yield Erase(erased)
    if usable:
        begun = _Outline(1, {1: False})
        yield Begin(BEGUN, chance.choice(usable))
        for _ in range(chance.randint(1, 3)):
            yield _turn(chance, BEGUN, begun)
        yield Delete(BEGUN)
    for name in chance.sample(names, len(names)):
        yield Erase(name)


def _response(chance: random.Random, name: str, previous: str | None) -> Respond:
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
    body = _sampling(chance) | {"input": text, "max_output_tokens": chance.randint(5, 60)}
    is_cancelled = chance.random() < 0.15
    if is_cancelled:
        body |= {"max_output_tokens": ENDLESS, "ignore_eos": True, "stop": None}
    if is_cancelled or chance.random() < 0.4:
        body["background"] = True
    if chance.random() < 0.6:
        body |= {"stream": True, "include": ["message.output_text.logprobs"]}
    return Respond(name, previous, body, is_cancelled)


def _turn(chance: random.Random, name: str, session: _Outline) -> ScriptedTurn:
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
    body = _sampling(chance) | {"prompt": text, "max_tokens": chance.randint(5, 60)}
    kind = chance.random()
    if kind < 0.25 and session.kept[session.turn]:
        body["prompt"] = ""
    elif kind < 0.3:
        body["prompt"] = " ".join(chance.choices(WORDS, k=chance.randint(100, 1000)))
    elif kind < 0.35:
        body["max_tokens"] = 0
    if chance.random() < 0.7:
        body |= {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    turn = ScriptedTurn(name, session.turn, body)
    session.advance(body["ignore_eos"] and "stop" not in body and body["max_tokens"] > 0)
    return turn


def _sampling(chance: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "seed": chance.getrandbits(63),
        "temperature": chance.choice((0.0, 0.7, 1.0, 1.6)),
        "ignore_eos": chance.random() < 0.8,
    }
    if chance.random() < 0.4:
        body |= {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    if chance.random() < 0.3:
        body |= {"top_p": 0.9, "top_k": 50}
    if chance.random() < 0.15:
        body["stop"] = chance.choice(STOPS)
    return body
