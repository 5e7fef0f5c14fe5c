"""Proof that kill -9 loses nothing: sessions under load, killed again and again, against a twin.

    python -m loadtest.kill_sessions --kills 200 --sessions 16 --seed 0

Every client follows a script of turns, rewinds, forks and deletions, again and again. A server that
nobody kills tells first what must come of each step. Then servers on one data folder are killed at
seeded moments: after some number of steps, or when then a stream shows its last token, so that its
turn is being committed. After each restart a client's sessions must be what the last acknowledged
step left, or what the step in flight makes of them, and nothing else. The step in flight is then
taken again. All texts must be those of the first server, and so must exported states, bit for bit.
Ends with status 1 if anything was not.
"""

import asyncio
import random
import re
import sqlite3
import tempfile
from pathlib import Path
from typing import Annotated

import httpx
import typer

from loadtest.kill_client import list_sessions, look
from loadtest.kill_player import Moment, Player, Scene, Tally, rehearse
from loadtest.kill_scripts import FORK, KEEP_TURNS, MAIN, script
from model import PRETRAINED
from server.serve import STORE_FILE
from tests.server.processes import ServerProcess, server_process

KEEP = ("--keep-turns", str(KEEP_TURNS))
FEW_ROWS = ("--warm-sessions", "5")
"""So that turns begin from warm rows, from host memory and from the store."""

MOST_STEPS = 6
"""Of a client, on average, before its server is killed; most kills come sooner."""

STEP_S = 0.1
"""A kill comes at most so long after a step's end."""

AT_LAST_TOKENS = 0.4
"""Share of the kills that wait for the last token of a stream."""

COMMIT_S = 0.008
"""They come at most so long after it."""

COMPARED = 0.25
"""Share of the sessions whose states are exported after a restart."""


def run(checkpoint: Path, folder: Path, *, kills: int, sessions: int, seed: int) -> Tally:
    """Kill servers of this checkpoint; the folder gets their data."""
    tally, chance, data = Tally(), random.Random(seed), folder / "data"
    with server_process(checkpoint, folder / "twin", *KEEP) as server:
        stories = asyncio.run(_rehearse_all(server.url, sessions, seed))
    players = [Player(number, scenes, tally) for number, scenes in enumerate(stories)]
    for _ in range(kills):
        with server_process(checkpoint, data, *KEEP, *FEW_ROWS) as server:
            asyncio.run(_check_and_kill(server, players, tally, chance))
    with server_process(checkpoint, data, *KEEP, *FEW_ROWS) as server:
        counted = asyncio.run(_check_at_the_end(server.url, players, tally))
        server.stop()
    _check_file(data / STORE_FILE, counted, tally)
    return tally


async def _rehearse_all(url: str, sessions: int, seed: int) -> list[list[Scene]]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        scripts = [script(seed, number) for number in range(sessions)]
        return await asyncio.gather(
            *(rehearse(http, number, steps) for number, steps in enumerate(scripts))
        )


async def _check_and_kill(
    server: ServerProcess, players: list[Player], tally: Tally, chance: random.Random
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await _check(http, players, COMPARED, chance)
        moment = Moment()
        waiting = asyncio.create_task(_wait(moment, MOST_STEPS * len(players), chance))
        playing = asyncio.create_task(_play(http, players, moment))
        await asyncio.wait([waiting, playing], return_when=asyncio.FIRST_COMPLETED)
        moment.killed.set()
        server.process.kill()
        waiting.cancel()
        await playing
    tally.kills.update(set(moment.hits) or {"idle"})


async def _play(http: httpx.AsyncClient, players: list[Player], moment: Moment) -> None:
    await asyncio.gather(*(player.play(http, moment) for player in players))


async def _wait(moment: Moment, most_steps: int, chance: random.Random) -> None:
    """Until it is time for a kill."""
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
        compare = [name for name in (MAIN, FORK) if chance.random() < share]
        await player.check(http, own, compare)


async def _check_at_the_end(
    url: str, players: list[Player], tally: Tally
) -> tuple[int, int, int, int]:
    """Sessions, checkpoints and their bytes by the API, all bytes by the metrics."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await _check(http, players, 1, random.Random(0))
        listed = await list_sessions(http)
        looks = [await look(http, [session], session.life) for session in listed]
        kept = [kept for world in looks for seen in world.values() for kept in seen.checkpoints]
        metrics = (await http.get("/metrics")).text
    shown = (len(listed), len(kept), sum(num_bytes for _, _, num_bytes in kept))
    told = [
        _metric(metrics, name)
        for name in (
            'latentd_sessions{tier="store"}',
            "latentd_session_checkpoints",
            'latentd_session_bytes{tier="store"}',
        )
    ]
    if (told[0], told[1]) != (shown[0], shown[1]):
        tally.problems.append(("wrong account", f"metrics {told}, sessions {shown}"))
    return *shown, told[2]


def _metric(text: str, name: str) -> int:
    [value] = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return int(float(value))


def _check_file(path: Path, counted: tuple[int, int, int, int], tally: Tally) -> None:
    """The store of a server that has ended: whole, and with the bytes that it told."""
    db = sqlite3.connect(path)
    try:
        [integrity] = db.execute("PRAGMA integrity_check").fetchone()
        dangling = db.execute("PRAGMA foreign_key_check").fetchall()
        [sessions] = db.execute("SELECT count(*) FROM sessions").fetchone()
        checkpoints, blobs = db.execute(
            "SELECT count(*), coalesce(sum(length(blob)), 0) FROM checkpoints"
        ).fetchone()
        [answers] = db.execute(
            "SELECT coalesce(sum(length(CAST(answer AS BLOB))), 0) FROM answers"
        ).fetchone()
    finally:
        db.close()
    if integrity != "ok" or dangling:
        tally.problems.append(("damaged file", f"{integrity}, {dangling}"))
    if (found := (sessions, checkpoints, blobs, blobs + answers)) != counted:
        tally.problems.append(("wrong account", f"file {found}, server {counted}"))


def report(tally: Tally, kills: int) -> None:
    """Print what happened."""
    print(f"{kills} kills; what they hit, as far as a client can tell:")
    for phase in sorted(tally.kills, key=lambda phase: -tally.hits[phase]):
        print(f"  {phase:18} {tally.kills[phase]:5} kills {tally.hits[phase]:6} steps")
    for kind in ("turns", "other steps"):
        print(
            f"{kind}: {tally.acknowledged[kind]:,} acknowledged, {tally.in_flight[kind]:,} in "
            f"flight at a kill, of these {tally.committed[kind]:,} found committed"
        )
    print(f"answers replayed: {tally.replays:,}; states compared: {tally.states_compared:,}")
    kinds = ("lost", "half applied", "wrong text", "wrong state", "refused")
    for kind in (*kinds, "wrong account", "damaged file"):
        print(f"{kind}: {tally.count(kind)}")
    for kind, story in tally.problems:
        print(f"{kind}: {story[:2000]}")


def main(
    kills: Annotated[int, typer.Option(help="How often a server is killed.")] = 200,
    sessions: Annotated[int, typer.Option(help="Clients, each with sessions of its own.")] = 16,
    seed: Annotated[int, typer.Option(help="Of scripts and moments.")] = 0,
    checkpoint: Annotated[Path, typer.Option(help="Folder of the model.")] = PRETRAINED,
) -> None:
    """Kill servers, print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        tally = run(checkpoint, Path(folder), kills=kills, sessions=sessions, seed=seed)
    report(tally, kills)
    if tally.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
