"""Whatever runs concurrently, each session gets the tokens and bits that it gets alone.

Few rows, a small host cache and few checkpoints, so that states pass through all tiers.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from server.sessions.codec import read
from tests.patience import PATIENCE_S
from tests.server.api.calls import plain_events
from tests.server.live import LiveServer, live_server, tiny_settings

KEPT = 3
History = tuple[int, ...]
"""The seeds of a session's turns, which determine them completely."""


def request(seed: int) -> dict[str, Any]:
    """A turn's request, of many kinds."""
    chance = random.Random(seed)
    body: dict[str, Any] = {
        "prompt": [chance.randrange(4, 300) for _ in range(chance.choice([1, 3, 40, 150]))],
        "max_tokens": chance.choice([0, 1, 7, 30]),
        "temperature": chance.choice([0.0, 1.0]),
        "seed": seed,
        "presence_penalty": chance.choice([0.0, 0.7]),
        "ignore_eos": True,
    }
    if chance.random() < 0.3:
        body["stop"] = [chance.choice("etaoin")]
    return body


class Twins:
    """Every history alone, without concurrent requests."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.known: dict[History, tuple[str, dict[str, bytes]]] = {}

    def after(self, history: History) -> tuple[str, dict[str, bytes]]:
        """The text of the last turn, and the state after it."""
        if history not in self.known:
            with self._server.client() as client:
                session_id = client.post("/v1/sessions").json()["id"]
                for number, seed in enumerate(history, 1):
                    body = request(seed) | {"session_id": session_id}
                    answer = client.post("/v1/completions", json=body).json()
                    blob = client.get(f"/v1/sessions/{session_id}/state").content
                    done = (answer["choices"][0]["text"], tensors(blob))
                    self.known[history[:number]] = done
                client.delete(f"/v1/sessions/{session_id}")
        return self.known[history]


def tensors(blob: bytes) -> dict[str, bytes]:
    """All of the session's tensors, without the counters."""
    facts, arrays = read(blob)
    kept = {name: values.tobytes() for name, values in arrays.items()}
    return kept | {name: facts[name].encode() for name in ("position", "pending", "undecoded")}


@pytest.fixture(scope="module")
def crowded(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with minimal capacity."""
    folder = tmp_path_factory.mktemp("crowded")
    limits = {"max_running": 2, "warm_sessions": 1, "host_cache_bytes": 30_000}
    few = tiny_settings(tiny_checkpoint, folder, keep_turns=KEPT, prefix_cache_bytes=0, **limits)
    with live_server(few) as running:
        yield running


@pytest.fixture(scope="module")
def twins(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = tmp_path_factory.mktemp("alone")
    with live_server(tiny_settings(tiny_checkpoint, folder)) as running:
        yield Twins(running)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["turn"] * 5 + ["stream", "abort", "abort", "rewind", "fork", "move"]),
        st.integers(0, 30),
    ),
    min_size=4,
    max_size=7,
)
LIVES = st.integers(2, 8).flatmap(lambda n: st.lists(STEPS, min_size=n, max_size=n))


class Session:
    """One session, and its expected content."""

    def __init__(self, client: httpx.AsyncClient, twins: Twins) -> None:
        self._client = client
        self._twins = twins
        self._id = ""
        self._history: History = ()
        self._kept = 0

    async def live(self, steps: list[tuple[str, int]]) -> None:
        """Run all steps, with a check after each."""
        self._id = (await self._client.post("/v1/sessions")).json()["id"]
        for step, number in steps:
            await getattr(self, f"_{step}")(number)
            await self._check()
        assert (await self._client.delete(f"/v1/sessions/{self._id}")).status_code == 200

    async def _turn(self, seed: int, *, streamed: bool = False) -> None:
        body = request(seed) | {"session_id": self._id, "stream": streamed}
        response = await self._client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        self._history += (seed,)
        self._kept = min(self._kept + 1, KEPT)
        if not streamed:
            text = response.json()["choices"][0]["text"]
            assert text == self._twins.known[self._history][0]

    async def _stream(self, seed: int) -> None:
        await self._turn(seed, streamed=True)

    async def _abort(self, number: int) -> None:
        """Disconnect in the middle of a turn, or before its first token."""
        body = request(number) | {"session_id": self._id, "max_tokens": 60_000, "stream": True}
        body["temperature"] = 1.0  # the most probable token of some has no text, for ever
        body.pop("stop", None)
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            lines, reported = response.aiter_lines(), list[str]()
            while len(reported) < number % 5 * 4:
                line = await anext(lines, None)
                assert line is not None, reported
                reported.append(line)
        while (await self._get())["status"] == "busy":
            pass

    async def _rewind(self, number: int) -> None:
        back = number % (self._kept or 1)
        turn = len(self._history) - back if self._kept else 0
        path = f"/v1/sessions/{self._id}/rewind"
        response = await self._client.post(path, json={"turn": turn})
        assert response.status_code == 200, response.text
        self._history = self._history[:turn]
        self._kept -= back if self._kept else 0

    async def _fork(self, number: int) -> None:
        """Continue with a fork of an earlier turn, and delete the original."""
        back = number % (self._kept or 1)
        turn = len(self._history) - back if self._kept else 0
        path = f"/v1/sessions/{self._id}"
        forked = (await self._client.post(f"{path}/fork", json={"turn": turn})).json()
        assert (await self._client.delete(path)).status_code == 200
        self._id = forked["id"]
        self._history = self._history[:turn]
        self._kept = min(self._kept, 1)

    async def _move(self, _: int) -> None:
        """Continue with an exported and imported copy."""
        if not self._history:
            return
        path = f"/v1/sessions/{self._id}"
        blob = (await self._client.get(f"{path}/state")).content
        assert (await self._client.delete(path)).status_code == 200
        imported = await self._client.post("/v1/sessions/import", content=blob)
        assert imported.status_code == 201, imported.text
        self._id = imported.json()["id"]
        self._kept = 1

    async def _get(self) -> dict[str, Any]:
        return dict((await self._client.get(f"/v1/sessions/{self._id}")).json())

    async def _check(self) -> None:
        session = await self._get()
        assert (session["turn"], session["checkpoints"]) == (len(self._history), self._kept)
        if self._history:
            blob = (await self._client.get(f"/v1/sessions/{self._id}/state")).content
            assert tensors(blob) == self._twins.known[self._history][1]


def histories(steps: list[tuple[str, int]]) -> Iterator[History]:
    """Every history that the steps can lead to."""
    history: History = ()
    kept = 0
    for step, number in steps:
        if step in ("turn", "stream"):
            history += (number,)
            kept = min(kept + 1, KEPT)
        elif step in ("rewind", "fork") and kept:
            back = number % kept
            history = history[: len(history) - back]
            kept = 1 if step == "fork" else kept - back
        elif step == "move":
            kept = min(kept, 1)
        yield history


@pytest.mark.long
def test_each_session_is_as_if_it_were_alone(crowded: LiveServer, twins: Twins) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        phases=[Phase.generate],  # what two servers do together cannot be made smaller
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(lives=LIVES)
    def play(lives: list[list[tuple[str, int]]]) -> None:
        for steps in lives:
            for history in histories(steps):
                if history:
                    twins.after(history)
        asyncio.run(play_together(crowded, twins, lives))

    play()
    value = crowded.service.metrics.registry.get_sample_value
    for tier in ("device", "host"):
        assert (value("latentd_session_evictions_total", {"tier": tier}) or 0) > 10
    assert value("latentd_sessions", {"tier": "store"}) == 0
    assert value("latentd_session_bytes", {"tier": "store"}) == 0


async def play_together(
    server: LiveServer, twins: Twins, lives: list[list[tuple[str, int]]]
) -> None:
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
        asyncio.TaskGroup() as group,
    ):
        for steps in lives:
            group.create_task(Session(client, twins).live(steps))


NUM_SESSIONS = 8
NUM_TURNS = 12


class Conversation:
    """A session whose turns are streamed, and retried as long as they are rejected."""

    def __init__(self, client: httpx.AsyncClient, twins: Twins, history: History) -> None:
        self._client = client
        self._twins = twins
        self._history = history

    async def hold(self) -> int:
        """Run all turns. Returns how often one was rejected."""
        session_id = (await self._client.post("/v1/sessions")).json()["id"]
        num_refused = 0
        for number, seed in enumerate(self._history, 1):
            body = request(seed) | {"session_id": session_id, "stream": True}
            async with asyncio.timeout(PATIENCE_S):
                while not await self._turn(number, body):
                    num_refused += 1
                    await asyncio.sleep(0.01)
        session = (await self._client.get(f"/v1/sessions/{session_id}")).json()
        assert (session["turn"], session["status"]) == (len(self._history), "idle")
        blob = (await self._client.get(f"/v1/sessions/{session_id}/state")).content
        assert tensors(blob) == self._twins.known[self._history][1]
        return num_refused

    async def _turn(self, number: int, body: dict[str, Any]) -> bool:
        """Whether the turn ran; if so, it completed."""
        response = await self._client.post("/v1/completions", json=body)
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full"
            return False
        assert response.status_code == 200, response.text
        *events, done = plain_events(response.text)
        assert done == "[DONE]"
        assert [event for event in events if "error" in event] == []
        assert events[-1]["session_turn"] == number
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == self._twins.known[self._history[:number]][0]
        return True


@pytest.mark.long
def test_a_stream_that_began_comes_to_its_end(
    tiny_checkpoint: Path, tmp_path: Path, twins: Twins
) -> None:
    """With however few rows and places, a turn is only rejected by a status."""
    limits = {"max_running": 2, "warm_sessions": 2, "max_waiting": 3}
    histories = [
        tuple(range(100 + first, 100 + first + NUM_TURNS))
        for first in range(0, NUM_SESSIONS * NUM_TURNS, NUM_TURNS)
    ]
    for history in histories:
        twins.after(history)

    async def all_of_them(server: LiveServer) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            lives = [Conversation(client, twins, history).hold() for history in histories]
            num_refused = sum(await asyncio.gather(*lives))
        value = server.service.metrics.registry.get_sample_value
        reported = value("latentd_admission_rejections_total", {"reason": "queue_full"}) or 0
        assert reported == num_refused

    with live_server(tiny_settings(tiny_checkpoint, tmp_path, **limits)) as server:
        asyncio.run(all_of_them(server))
        server.wait_until_idle()
