"""Proof that kill -9 loses nothing: sessions and responses under load, against a twin.

    python -m loadtest chaos --kills 200 --servers 4 --clients 16 --seed 0

Every client follows a script of turns, rewinds, forks and deletions of sessions and of stored
responses, whole, streamed, in the background and cancelled, again and again. A server that nobody
kills first shows what must come of each step. Then servers on one data folder are killed at seeded
moments: after some number of steps, or once a stream shows its last token, so that its turn is
being committed. After each restart a client's sessions and responses must be what the last
acknowledged step left, or what the step in flight makes of them, and nothing else. A response in
the background whose creation was acknowledged is there, whole or as failed. The last turn is asked
for again and must be answered with the answer that was kept; then the step in flight is run again.
All texts must be those of the first server, and so must exported states, bit for bit.

Meanwhile other clients leave in the middle of their streams, whose sessions must stay where they
were, or read them slowly; and what each server counts is held against what was sent and answered.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from loadtest.chaos.crowds import Crowds, slow_stream
from loadtest.chaos.file import Account, check_file
from loadtest.chaos.look import list_sessions, look_at_sessions
from loadtest.chaos.player import Player, RunState, Scene, rehearse
from loadtest.chaos.scripts import KEEP_TURNS, script
from loadtest.chaos.tally import Tally
from loadtest.chaos.totals import Totals, completions, watch
from loadtest.processes import parse_metrics
from server.sessions.sqlite.store import STORE_FILE
from tests.server.processes import ServerProcess

KEEP = ("--keep-turns", str(KEEP_TURNS))
PATIENT = ("--header-timeout-s", "3600", "--body-timeout-s", "3600", "--stall-timeout-s", "3600")
"""With clients that are stopped for a while, as the servers may be."""

FEW_ROWS = ("--warm-sessions", "5")
"""Server settings that make turns start from warm rows, from host memory and from the store."""

MAX_STEPS = 6
"""Mean number of steps per client before its server is killed; most kills come sooner."""

STEP_S = 0.1
"""Maximum delay of a kill after a step's end, in seconds."""

AT_LAST_TOKENS = 0.4
"""Share of the kills that wait for the last token of a stream."""

COMMIT_S = 0.008
"""Maximum delay of those kills, in seconds."""

PATIENCE_S = 1800
"""With a server whose machine may have other work, or that is stopped for a while."""

COMPARED = 0.25
"""Share of the sessions and responses whose states are exported after a restart."""


async def run(
    checkpoint: Path,
    folder: Path,
    *,
    kills: int,
    servers: int,
    clients: int,
    left: int,
    slow: int,
    seed: int,
    tally: Tally,
) -> None:
    """Kill servers of this checkpoint; the folder gets their data, the tally what happens.

    Each has `clients` scripted clients, `left` that disconnect, and `slow` ones.
    """
    twin = _server(checkpoint, folder / "twin", *KEEP, *PATIENT)
    async with twin as server, _http(server, Totals()) as http:
        slow_text = "".join([piece async for piece in slow_stream(http)])
        scripts = [script(seed, number) for number in range(clients)]
        stories = await asyncio.gather(
            *(rehearse(http, number, steps) for number, steps in enumerate(scripts))
        )
    await asyncio.gather(
        *(
            _kill_repeatedly(
                *(checkpoint, folder / f"{number}", stories, tally),
                Crowds(left, slow, slow_text, tally, random.Random(f"{seed}/{number} crowds")),
                kills=kills // servers + (number < kills % servers),
                chance=random.Random(f"{seed}/{number}"),
            )
            for number in range(servers)
        )
    )


async def _kill_repeatedly(
    checkpoint: Path,
    data: Path,
    stories: Sequence[Sequence[Scene]],
    tally: Tally,
    crowds: Crowds,
    *,
    kills: int,
    chance: random.Random,
) -> None:
    """Servers on one data folder, one after the other."""
    players = [Player(number, scenes, tally) for number, scenes in enumerate(stories)]
    for _ in range(kills):
        async with _server(checkpoint, data, *KEEP, *PATIENT, *FEW_ROWS) as server:
            await _check_and_kill(server, players, crowds, tally, chance)
    async with _server(checkpoint, data, *KEEP, *PATIENT, *FEW_ROWS) as server:
        account = await _check_at_the_end(server, players, crowds, tally)
        await asyncio.to_thread(server.stop)
    check_file(data / STORE_FILE, account, players, tally)


@asynccontextmanager
async def _server(checkpoint: Path, data: Path, *flags: str) -> AsyncIterator[ServerProcess]:
    server = await asyncio.to_thread(ServerProcess, checkpoint, data, *flags)
    try:
        yield server
    finally:
        server.process.kill()  # at once: a task that is interrupted may be cancelled again here
        await asyncio.to_thread(server.wait)


def _http(server: ServerProcess, totals: Totals) -> httpx.AsyncClient:
    """A new connection per request: an idle one may be closed by the server while it is being
    used."""
    limits, hooks = httpx.Limits(max_keepalive_connections=0), {"request": [totals.count]}
    return httpx.AsyncClient(
        base_url=server.url, timeout=PATIENCE_S, limits=limits, event_hooks=hooks
    )


async def _check_and_kill(
    server: ServerProcess,
    players: list[Player],
    crowds: Crowds,
    tally: Tally,
    chance: random.Random,
) -> None:
    totals = Totals()
    async with _http(server, totals) as http:
        await _check(http, players, COMPARED, chance)
        await crowds.check(http)
        moment = RunState(totals)
        waiting = asyncio.create_task(_wait(moment, MAX_STEPS * len(players), chance))
        playing = asyncio.create_task(_play(http, players, moment))
        others = asyncio.gather(crowds.play(http, totals), watch(http, totals, tally))
        await asyncio.wait([waiting, playing], return_when=asyncio.FIRST_COMPLETED)
        moment.killed.set()
        server.process.kill()
        tally.num_kills += 1
        waiting.cancel()
        await playing
        await others
    tally.kills.update(set(moment.hits) or {"idle"})


async def _play(http: httpx.AsyncClient, players: list[Player], moment: RunState) -> None:
    await asyncio.gather(*(player.play(http, moment) for player in players))


async def _wait(moment: RunState, most_steps: int, chance: random.Random) -> None:
    """Wait for the moment of a kill."""
    at_last_token = chance.random() < AT_LAST_TOKENS
    for _ in range(round(most_steps * chance.random() ** 2)):
        await moment.steps.acquire()
    if at_last_token:
        moment.last_token.clear()
        await moment.last_token.wait()
    await asyncio.sleep(chance.uniform(0, COMMIT_S if at_last_token else STEP_S))


async def _check(
    http: httpx.AsyncClient, players: list[Player], share: float, chance: random.Random
) -> None:
    listed = await list_sessions(http)
    for player in players:
        own = [session for session in listed if session.client == player.number]
        await player.check(http, own, share, chance)


async def _check_at_the_end(
    server: ServerProcess, players: list[Player], crowds: Crowds, tally: Tally
) -> Account:
    """The server's account of its content."""
    totals = Totals()
    async with _http(server, totals) as http:
        await _check(http, players, 1, random.Random(0))
        await crowds.check(http)
        listed = await list_sessions(http)
        looks = [await look_at_sessions(http, [session], session.life) for session in listed]
        metrics = parse_metrics((await http.get("/metrics")).text)
    if (counted := completions(metrics)) != totals.sent:
        story = f"{counted:g} completions of a server that nobody killed; sent {totals.sent}"
        tally.problems.append(("wrong metrics", story))
    account = Account(
        sessions=int(metrics['latentd_sessions{tier="store"}']),
        responses=int(metrics["latentd_responses"]),
        states=int(metrics["latentd_session_checkpoints"]),
        num_bytes=int(metrics['latentd_session_bytes{tier="store"}']),
        checkpoints=sorted(
            kept for sessions in looks for one in sessions.values() for kept in one.checkpoints
        ),
    )
    if account.sessions != len(listed):
        tally.problems.append(("wrong account", f"{account}, sessions: {len(listed)}"))
    return account
