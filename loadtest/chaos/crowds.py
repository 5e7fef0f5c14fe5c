"""Clients that disconnect in the middle of their streams, and clients that read slowly."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.chaos.look import Refused, check
from loadtest.chaos.scripts import ENDLESS
from loadtest.chaos.tally import Tally
from loadtest.chaos.totals import COMPLETIONS, Totals
from loadtest.client import events

NOBODY = -1
"""Client number in the metadata of their sessions; not used by scripted clients."""

MAX_EVENTS = 20
"""Events read before the client disconnects."""

POLL_S = 0.02
SLOW_PROMPT = "the cat sat on"
SLOW_TOKENS = 300
SLOW_S = 0.01
"""Seconds between two events that are read."""

RECEIVE_BYTES = 4096
"""Socket buffer of a slow reader: further data waits in the server."""


@dataclass
class Left:
    """A session whose turns are repeatedly abandoned, and its acknowledged turn."""

    number: int
    id: str = ""
    turn: int = 0
    is_in_flight: bool = False
    """A turn was sent without receiving its end: it may have been committed when its server was
    killed."""

    async def play(
        self, http: httpx.AsyncClient, totals: Totals, tally: Tally, chance: random.Random
    ) -> None:
        """Run a turn to its end, then abandon one, until the server is gone."""
        try:
            if not self.id:
                notes = {"client": f"{NOBODY}", "life": "0", "name": f"left {self.number}"}
                made = check(await http.post("/v1/sessions", json={"metadata": notes}))
                self.id = made.json()["id"]
            while True:
                await self._whole_turn(http, totals)
                await self._left_turn(http, tally, chance)
        except httpx.TransportError:
            pass
        except Refused as error:
            tally.problems.append(("refused", f"{self}: {error}"))

    async def check(self, http: httpx.AsyncClient, tally: Tally) -> None:
        """Check the session's turn on a new server."""
        if not self.id:
            return
        turn = check(await http.get(f"/v1/sessions/{self.id}")).json()["turn"]
        if not self.turn <= turn <= self.turn + self.is_in_flight:
            kind = "lost" if turn < self.turn else "half applied"
            tally.problems.append((kind, f"{self}, found at turn {turn}"))
        self.turn, self.is_in_flight = turn, False
        tally.verified["sessions left in a storm"] += 1

    async def _whole_turn(self, http: httpx.AsyncClient, totals: Totals) -> None:
        self.is_in_flight = True
        body = {"prompt": " and", "max_tokens": 4, "session_id": self.id}
        answer = check(await http.post(COMPLETIONS, json=body | {"expected_turn": self.turn}))
        self.turn, self.is_in_flight = self.turn + 1, False
        totals.acknowledge(answer.json()["usage"]["completion_tokens"])

    async def _left_turn(
        self, http: httpx.AsyncClient, tally: Tally, chance: random.Random
    ) -> None:
        """No client could have received its end, so it must leave the session unchanged."""
        body: dict[str, Any] = {"prompt": " and", "max_tokens": ENDLESS, "ignore_eos": True}
        body |= {"stream": True, "session_id": self.id, "expected_turn": self.turn}
        left_after = chance.randrange(MAX_EVENTS)
        async with http.stream("POST", COMPLETIONS, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                check(answer)
            async for _ in answer.aiter_lines():
                left_after -= 1
                if left_after < 0:
                    break
        found: dict[str, Any] = {"status": "busy"}
        while found["status"] != "idle":
            await asyncio.sleep(POLL_S)
            found = check(await http.get(f"/v1/sessions/{self.id}")).json()
        if found["turn"] != self.turn:
            tally.problems.append(("half applied", f"{self}, left, is at turn {found['turn']}"))
        tally.verified["disconnects"] += 1


@dataclass
class Crowds:
    """These clients of one data folder, across servers."""

    num_left: int
    num_slow: int
    slow_text: str
    """Complete text of the slow readers' stream."""

    tally: Tally
    chance: random.Random
    left: list[Left] = field(init=False)

    def __post_init__(self) -> None:
        self.left = [Left(number) for number in range(self.num_left)]

    async def check(self, http: httpx.AsyncClient) -> None:
        """Check after a restart."""
        await asyncio.gather(*(each.check(http, self.tally) for each in self.left))

    async def play(self, http: httpx.AsyncClient, totals: Totals) -> None:
        """Run until the server is gone."""
        async with _slow_http(http, totals) as slow:
            await asyncio.gather(
                *(each.play(http, totals, self.tally, self.chance) for each in self.left),
                *(self._read_slowly(slow) for _ in range(self.num_slow)),
            )

    async def _read_slowly(self, http: httpx.AsyncClient) -> None:
        text = ""
        try:
            while True:
                text = ""
                async for piece in slow_stream(http):
                    text += piece
                    await asyncio.sleep(SLOW_S)
                self._note_read(text, self.slow_text)
        except httpx.TransportError:
            self._note_read(text, self.slow_text[: len(text)])
        except Refused as error:
            self.tally.problems.append(("refused", f"a slow reader: {error}"))

    def _note_read(self, text: str, expected: str) -> None:
        if text != expected:
            self.tally.problems.append(("wrong text", f"slowly read: {text!r}, not {expected!r}"))
        self.tally.verified["texts read slowly"] += 1


async def slow_stream(http: httpx.AsyncClient) -> AsyncIterator[str]:
    """Texts of the events of the slow readers' stream."""
    body: dict[str, Any] = {"prompt": SLOW_PROMPT, "max_tokens": SLOW_TOKENS, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "logprobs": 5}
    async with http.stream("POST", COMPLETIONS, json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            check(answer)
        async for data in events(answer):
            if data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise Refused(f"{event['error']}")
                yield event["choices"][0]["text"]


@asynccontextmanager
async def _slow_http(http: httpx.AsyncClient, totals: Totals) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the same server with small socket buffers."""
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)]
    async with httpx.AsyncClient(
        base_url=http.base_url,
        timeout=http.timeout,
        transport=httpx.AsyncHTTPTransport(socket_options=options),
        event_hooks={"request": [totals.count]},
    ) as slow:
        yield slow
