"""A client whose server is killed again and again, and what it holds against its server."""

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
"""Of a client's responses that were erased, so many are asked for again after a kill; the last."""


@dataclass(frozen=True)
class Scene:
    """A step, and what must come of it."""

    step: Step
    before: World
    after: World
    answer: TurnResult | SeenResponse | None
    digests: dict[str, str]
    """Of the states of sessions and responses after it."""


@dataclass(frozen=True)
class RunState:
    """What the clients of one server wait for or announce."""

    totals: Totals
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    last_token: asyncio.Event = field(default_factory=asyncio.Event)
    """Some stream has shown its last token, so that its turn is being committed."""

    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Has one more for each step that was acknowledged."""

    hits: list[str] = field(default_factory=list)
    """Phases of the steps in flight when the server was killed."""


async def rehearse(http: httpx.AsyncClient, number: int, steps: Sequence[Step]) -> list[Scene]:
    """Run the steps of a client on a server that nobody kills."""
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
    """Runs the steps of its scenes from first to last and then anew, from server to server."""

    def __init__(self, number: int, scenes: Sequence[Scene], tally: Tally) -> None:
        self._scenes = scenes
        self._tally = tally
        self._client = Client(number)
        self._index = 0
        self._in_flight = False
        self._found = False
        """Whether the turn to run was found to be committed, and must be replayed."""

        self._last_turn: TurnResult | None = None
        """The answer of the step before, if that was a turn."""

        self._is_out = False
        """Something was wrong: it takes no more part."""

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
        """See whether a new server has what it must have, and this share of the states."""
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
        """Its creation was acknowledged: it is there, whole or as failed. The latter is erased."""
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
        """Run the turn before again: its answer was kept."""
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
        """Ids of those that must be there."""
        return self._client.responses.values()

    @property
    def erased(self) -> Iterable[str]:
        """Ids of responses that must not be there any more."""
        return self._client.erased

    def answers(self) -> dict[str, SeenResponse]:
        """What all of its responses must be, by name."""
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
            return  # what a cancelled response had said is kept nowhere
        if not expected.text.startswith(self._client.text):
            self._problem("wrong text", f"{self._client.text!r}, not {expected.text!r}")

    def _advance(self, answer: TurnResult | None = None) -> None:
        """To the next step; `answer` if this one was a turn that was seen to its end."""
        self._found, self._last_turn = False, answer
        self._index += 1
        if self._index == len(self._scenes):
            self._index, self._last_turn = 0, None
            self._client.life += 1

    def _problem(self, kind: str, story: str) -> None:
        self._is_out = True
        where = f"client {self.number}, life {self._client.life}, {self._scene.step}"
        self._tally.problems.append((kind, f"{where}: {story}"))
