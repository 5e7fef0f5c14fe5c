"""A client whose server is killed again and again, and what it holds against its server."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import httpx

from loadtest.kill_client import (
    Answer,
    Client,
    Listed,
    Refused,
    World,
    list_sessions,
    look,
    state_digest,
)
from loadtest.kill_scripts import Step, Take

Verdict = Literal["as acknowledged", "committed", "lost", "half applied"]


@dataclass(frozen=True)
class Scene:
    """A step, and what must come of it."""

    step: Step
    before: World
    after: World
    answer: Answer | None
    digests: dict[str, str]
    """Of the states of the sessions after it."""


@dataclass
class Tally:
    """What happened, and everything that should not have."""

    kills: Counter[str] = field(default_factory=Counter)
    """Kills that hit at least one step in this phase, or none at all."""

    hits: Counter[str] = field(default_factory=Counter)
    """Steps that were in this phase when the server was killed."""

    acknowledged: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    committed: Counter[str] = field(default_factory=Counter)
    """Of those in flight, steps that were found to have taken place."""

    replays: int = 0
    states_compared: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Kind and story of each."""

    def count(self, kind: str) -> int:
        """Problems of this kind."""
        return sum(kind == found for found, _ in self.problems)


@dataclass(frozen=True)
class Moment:
    """What the clients of one server wait for or announce."""

    killed: asyncio.Event = field(default_factory=asyncio.Event)
    last_token: asyncio.Event = field(default_factory=asyncio.Event)
    """Some stream has shown its last token, so that its turn is being committed."""

    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Has one more for each step that was acknowledged."""

    hits: list[str] = field(default_factory=list)
    """Phases of the steps in flight when the server was killed."""


def judge(before: World, after: World, seen: World) -> Verdict:
    """What became of a step; `after` is the same as `before` if none was in flight."""
    if seen == before:
        return "as acknowledged"
    if seen == after:
        return "committed"
    for name in before.keys() & after.keys():
        if name not in seen or seen[name].turn < min(before[name].turn, after[name].turn):
            return "lost"
    return "half applied"


async def rehearse(http: httpx.AsyncClient, number: int, steps: Sequence[Step]) -> list[Scene]:
    """Take the steps of a client on a server that nobody kills."""
    client, scenes, before = Client(number), list[Scene](), World()
    for index, step in enumerate(steps):
        answer = await client.take(http, step, f"{index}")
        listed = [session for session in await list_sessions(http) if session.client == number]
        after = await look(http, listed, client.life)
        digests = {session.name: await state_digest(http, session.id) for session in listed}
        scenes.append(Scene(step, before, after, answer, digests))
        before = after
    return scenes


class Player:
    """Takes the steps of its scenes from first to last and then anew, from server to server."""

    def __init__(self, number: int, scenes: Sequence[Scene], tally: Tally) -> None:
        self._scenes = scenes
        self._tally = tally
        self._client = Client(number)
        self._index = 0
        self._in_flight = False
        self._found = False
        """Whether the turn to take was found to be committed, and must be replayed."""

        self._is_out = False
        """Something was wrong: it takes no more part."""

    async def play(self, http: httpx.AsyncClient, moment: Moment) -> None:
        """Take steps until the server is killed."""
        self._client.on_last_token = moment.last_token.set
        while not moment.killed.is_set() and not self._is_out:
            self._in_flight = True
            try:
                answer = await self._client.take(http, self._scene.step, self._key)
            except httpx.TransportError as error:
                if not moment.killed.is_set():
                    self._problem("refused", repr(error))
                moment.hits.append(self._client.phase)
                self._note_hit()
            except Refused as error:
                self._problem("refused", str(error))
            else:
                self._in_flight = False
                moment.steps.release()
                self._note_answer(answer)

    async def check(
        self, http: httpx.AsyncClient, sessions: Sequence[Listed], compare: Sequence[str]
    ) -> None:
        """See whether a new server has what it must have; `compare` names states to export."""
        if self._is_out:
            return
        scene = self._scene
        seen = await look(http, sessions, self._client.life)
        before = scene.after if self._found else scene.before
        verdict = judge(before, scene.after if self._in_flight else before, seen)
        if verdict in ("lost", "half applied"):
            self._problem(verdict, f"{seen} after {before}; in flight: {self._in_flight}")
            return
        self._client.ids = {session.name: session.id for session in sessions}
        is_after = self._found or verdict == "committed"
        digests = scene.digests if is_after else self._scenes[self._index - 1].digests
        for name in self._client.ids.keys() & set(compare):
            self._tally.states_compared += 1
            if await state_digest(http, self._client.ids[name]) != digests[name]:
                self._problem("wrong state", f"{name}: {seen[name]}")
        if verdict == "committed":
            self._tally.committed[self._kind] += 1
            if isinstance(scene.step, Take):
                self._found = True
            else:
                self._advance()
        self._in_flight = False

    @property
    def number(self) -> int:
        return self._client.number

    @property
    def _scene(self) -> Scene:
        return self._scenes[self._index]

    @property
    def _kind(self) -> str:
        return "turns" if isinstance(self._scene.step, Take) else "other steps"

    @property
    def _key(self) -> str:
        return f"{self._client.life}/{self._index}"

    def _note_answer(self, answer: Answer | None) -> None:
        self._tally.acknowledged[self._kind] += 1
        self._tally.replays += self._client.replayed
        if answer != self._scene.answer:
            self._problem("wrong text", f"{answer}, not {self._scene.answer}")
        if self._client.replayed != self._found:
            self._problem("half applied", f"replayed: {self._client.replayed}")
        self._advance()

    def _note_hit(self) -> None:
        self._tally.hits[self._client.phase] += 1
        if not self._found:
            self._tally.in_flight[self._kind] += 1
        expected = self._scene.answer
        if expected is not None and not expected.text.startswith(self._client.text):
            self._problem("wrong text", f"{self._client.text!r}, not {expected.text!r}")

    def _advance(self) -> None:
        self._found = False
        self._index += 1
        if self._index == len(self._scenes):
            self._index = 0
            self._client.life += 1

    def _problem(self, kind: str, story: str) -> None:
        self._is_out = True
        where = f"client {self.number}, life {self._client.life}, {self._scene.step}"
        self._tally.problems.append((kind, f"{where}: {story}"))
