"""A client whose server is repeatedly killed, and its checks of the server."""

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import httpx

from loadtest.chaos.client import Client, TurnResult
from loadtest.chaos.look import (
    INTERRUPTED,
    Listed,
    Refused,
    SeenResponse,
    SeenSession,
    World,
    check,
    judge,
    list_sessions,
    look_at_responses,
    look_at_sessions,
    response_digest,
    state_digest,
)
from loadtest.chaos.scripts import Respond, ScriptedTurn, Step
from loadtest.chaos.tally import Tally
from loadtest.chaos.totals import Totals

MAX_ERASED = 20
"""Number of a client's erased responses that are requested again after a kill; the latest ones."""


@dataclass(frozen=True)
class Scene:
    """A step and its expected result."""

    step: Step
    before: World
    after: World
    answer: TurnResult | SeenResponse | None
    digests: dict[str, str]
    """Digests of the states of sessions and responses after it."""


@dataclass(frozen=True)
class RunState:
    """Shared state of the clients of one server."""

    totals: Totals
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    last_token: asyncio.Event = field(default_factory=asyncio.Event)
    """A stream has shown its last token, so its turn is being committed."""

    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released once per acknowledged step."""

    hits: list[str] = field(default_factory=list)
    """Phases of the steps in flight when the server was killed."""


async def rehearse(http: httpx.AsyncClient, number: int, steps: Sequence[Step]) -> list[Scene]:
    """Run a client's steps on a server that is not killed."""
    client, scenes, before, digests = Client(number), list[Scene](), World(), dict[str, str]()
    for index, step in enumerate(steps):
        answer = await client.run(http, step, f"{index}")
        listed = [session for session in await list_sessions(http) if session.client == number]
        sessions = await look_at_sessions(http, listed, client.life)
        responses = await look_at_responses(http, client.responses)
        known = {name: digests[name] for name in responses if name in digests}
        new = await _digests(http, client, [*sessions, *(responses.keys() - known.keys())])
        digests = known | new
        after: World = {**sessions, **responses}
        scenes.append(Scene(step, before, after, answer, digests))
        before = after
    return scenes


async def _digests(http: httpx.AsyncClient, client: Client, names: Sequence[str]) -> dict[str, str]:
    return {
        name: await state_digest(http, client.sessions[name])
        if name in client.sessions
        else await response_digest(http, client.responses[name], client.notes("probe"))
        for name in names
    }


class Player:
    """Runs its scenes repeatedly, across servers."""

    def __init__(self, number: int, scenes: Sequence[Scene], tally: Tally) -> None:
        self._scenes = scenes
        self._tally = tally
        self._client = Client(number)
        self._index = 0
        self._in_flight = False
        self._found = False
        """Whether the turn to run is already committed, and must be replayed."""

        self._last_turn: TurnResult | None = None
        """The previous step's answer, if it was a turn."""

        self._is_out = False
        """Something was wrong: this client is excluded."""

    async def play(self, http: httpx.AsyncClient, moment: RunState) -> None:
        """Run steps until the server is killed."""
        self._client.on_last_token = moment.last_token.set
        while not moment.killed.is_set() and not self._is_out:
            self._in_flight = True
            try:
                answer = await self._client.run(http, self._scene.step, self._key)
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
                if isinstance(answer, TurnResult):
                    is_new = not self._client.replayed
                    moment.totals.acknowledge(answer.completion_tokens if is_new else 0)
                self._note_answer(answer)

    async def check(
        self,
        http: httpx.AsyncClient,
        sessions: Sequence[Listed],
        share: float,
        chance: random.Random,
    ) -> None:
        """Check the content of a new server, and this share of the states."""
        if self._is_out:
            return
        try:
            await self._check(http, sessions, share, chance)
        except Refused as error:
            self._problem("refused", str(error))

    async def _check(
        self,
        http: httpx.AsyncClient,
        sessions: Sequence[Listed],
        share: float,
        chance: random.Random,
    ) -> None:
        client, scene = self._client, self._scene
        erased = {f"erased {id}": id for id in client.erased[-MAX_ERASED:]}
        seen: World = {**await look_at_sessions(http, sessions, client.life)}
        seen |= await look_at_responses(http, client.responses | erased)
        client.sessions = {session.name: session.id for session in sessions}
        if self._in_flight and client.is_created:
            await self._check_background(http, scene.step.name, seen)
        for name in client.responses.keys() - seen.keys():
            client.erased.append(client.responses.pop(name))
        before = scene.after if self._found else scene.before
        verdict = judge(before, scene.after if self._in_flight else before, seen)
        if verdict in ("lost", "half applied"):
            self._problem(verdict, f"{seen} after {before}; in flight: {self._in_flight}")
            return
        is_after = self._found or verdict == "committed"
        digests = scene.digests if is_after else self._scenes[self._index - 1].digests
        names = [name for name in sorted(seen) if chance.random() < share]
        for name, digest in (await _digests(http, client, names)).items():
            if digest != digests[name]:
                self._problem("wrong state", f"{name}: {seen[name]}")
        for one in seen.values():
            self._tally.verified["sessions" if isinstance(one, SeenSession) else "responses"] += 1
        self._tally.verified["erased responses"] += len(erased)
        self._tally.verified["states"] += len(names)
        if verdict == "committed":
            self._tally.committed[self._kind] += 1
            if isinstance(scene.step, ScriptedTurn):
                self._found = True
            else:
                self._advance()
        elif self._last_turn is not None and not self._found:
            await self._replay(http, self._last_turn)
        self._in_flight = False

    async def _check_background(self, http: httpx.AsyncClient, name: str, seen: World) -> None:
        """Its creation was acknowledged: it exists, complete or failed. A failed one is deleted."""
        if name not in seen:
            self._problem("lost", f"background {name} is not there")
        elif seen[name] == INTERRUPTED:
            response_id = self._client.responses[name]
            if await response_digest(http, response_id, self._client.notes("probe")) != "nothing":
                self._problem("half applied", f"interrupted {name} has a state")
            check(await http.delete(f"/v1/responses/{response_id}"))
            self._tally.interrupted += 1
            del seen[name]

    async def _replay(self, http: httpx.AsyncClient, last: TurnResult) -> None:
        """Run the previous turn again: its answer must be replayed."""
        step, key = self._scenes[self._index - 1].step, f"{self._client.life}/{self._index - 1}"
        answer = await self._client.run(http, step, key)
        self._tally.replays += 1
        is_same = isinstance(answer, TurnResult) and (answer, answer.id) == (last, last.id)
        if not (is_same and self._client.replayed):
            self._problem("wrong replay", f"{answer}, not {last}")

    @property
    def number(self) -> int:
        return self._client.number

    @property
    def responses(self) -> Iterable[str]:
        """Ids of responses that must exist."""
        return self._client.responses.values()

    @property
    def erased(self) -> Iterable[str]:
        """Ids of responses that must no longer exist."""
        return self._client.erased

    def answers(self) -> dict[str, SeenResponse]:
        """Expected value of all of its responses, by name."""
        return {
            scene.step.name: scene.answer
            for scene in self._scenes
            if isinstance(scene.answer, SeenResponse)
        }

    @property
    def _scene(self) -> Scene:
        return self._scenes[self._index]

    @property
    def _kind(self) -> str:
        match self._scene.step:
            case ScriptedTurn():
                return "turns"
            case Respond() as step:
                return "background responses" if step.is_background else "responses"
            case _:
                return "other steps"

    @property
    def _key(self) -> str:
        return f"{self._client.life}/{self._index}"

    def _note_answer(self, answer: TurnResult | SeenResponse | None) -> None:
        self._tally.acknowledged[self._kind] += 1
        self._tally.replays += self._client.replayed
        if answer != self._scene.answer:
            self._problem("wrong text", f"{answer}, not {self._scene.answer}")
        if self._client.replayed != self._found:
            self._problem("half applied", f"replayed: {self._client.replayed}")
        self._advance(answer if isinstance(answer, TurnResult) else None)

    def _note_hit(self) -> None:
        self._tally.hits[self._client.phase] += 1
        if not self._found:
            self._tally.in_flight[self._kind] += 1
        step, expected = self._scene.step, self._scene.answer
        if expected is None or (isinstance(step, Respond) and step.is_cancelled):
            return  # the text of a cancelled response is not stored
        if not expected.text.startswith(self._client.text):
            self._problem("wrong text", f"{self._client.text!r}, not {expected.text!r}")

    def _advance(self, answer: TurnResult | None = None) -> None:
        """Go to the next step; `answer` if this one was a turn whose end was received."""
        self._found, self._last_turn = False, answer
        self._index += 1
        if self._index == len(self._scenes):
            self._index, self._last_turn = 0, None
            self._client.life += 1

    def _problem(self, kind: str, story: str) -> None:
        self._is_out = True
        where = f"client {self.number}, life {self._client.life}, {self._scene.step}"
        self._tally.problems.append((kind, f"{where}: {story}"))
