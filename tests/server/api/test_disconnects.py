"""Clients that disconnect at any moment leave nothing behind, and block no one."""

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S, until, wait_until
from tests.server.api.calls import BODY, complete, send
from tests.server.live import LiveServer, live_server, tiny_settings

NUM_CLIENTS = 200
ENDLESS = BODY | {"max_tokens": 60_000}


@pytest.fixture
def server(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[LiveServer]:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path,
        max_running=8,
        warm_sessions=4,
        max_waiting=256,
        session_wait_s=PATIENCE_S,
    )
    with live_server(settings) as running:
        yield running


def raw_request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def leave_at_some_moment(port: int, body: dict[str, Any], chance: random.Random) -> None:
    """Send a request or part of it, maybe read for a while, and disconnect."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = raw_request(body)
    whole = chance.random() < 0.9
    writer.write(request if whole else request[: chance.randrange(len(request))])
    await writer.drain()
    try:
        async with asyncio.timeout(chance.choice([0, 0.01, 0.1, 0.5, 1.0])):
            while await reader.read(1000):
                pass
    except TimeoutError:
        pass
    if chance.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


def port_of(server: LiveServer) -> int:
    return int(server.url.rpartition(":")[2])


@pytest.mark.long
def test_two_hundred_clients_leave_at_any_moment(server: LiveServer) -> None:
    with server.client() as client:
        sessions = [client.post("/v1/sessions").json()["id"] for _ in range(20)]

        async def all_of_them() -> None:
            chance = random.Random(7)
            bodies = [
                ENDLESS
                | {"stream": number % 2 == 0, "seed": number}
                | ({"session_id": sessions[number // 10]} if number % 10 == 0 else {})
                for number in range(NUM_CLIENTS)
            ]
            await asyncio.gather(
                *(leave_at_some_moment(port_of(server), body, chance) for body in bodies)
            )

        asyncio.run(all_of_them())
        complete(client)  # long before all that they asked for could be generated
        server.wait_until_idle()
        wait_until(lambda: server.num_answered("ok") == 1)
        assert not server.service.open_turns._turns
        for session_id in sessions:
            session = client.get(f"/v1/sessions/{session_id}").json()
            assert (session["status"], session["turn"]) == ("idle", 0)
        slots = {
            state: server.service.metrics.slots.labels(state=state)._value.get()
            for state in ("free", "running", "warm")
        }
        assert slots == {"free": 12, "running": 0, "warm": 0}


def test_after_a_stop_button_the_next_turn_comes_at_once(server: LiveServer) -> None:
    with server.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        turn = ENDLESS | {"session_id": session_id}
        for number in range(20):
            with send(server.url, turn | {"stream": True}) as running:
                assert running.recv(1)
            if number % 2:
                turns = {"turn": number // 2 + 1}
                response = client.post(f"/v1/sessions/{session_id}/rewind", json=turns)
                assert response.status_code == 200, response.text
            else:
                answer = complete(client, session_id=session_id, max_tokens=1)
                assert answer["session_turn"] == number // 2 + 1
        server.wait_until_idle()
        assert not server.service.ledger._unlocked


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_is_free_at_once(server: LiveServer, stream: bool) -> None:
    """All rows belong to clients that disconnect; a waiting one is served promptly."""

    async def fill_and_leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            body = ENDLESS | {"stream": stream}
            running = [
                asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(8)
            ]
            await asyncio.to_thread(server.wait_until_running, 8)
            waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: server.num_waiting() == 1)
            assert not waiting.done()
            for task in running:
                task.cancel()
            assert (await waiting).status_code == 200

    asyncio.run(fill_and_leave())
    server.wait_until_idle()
    wait_until(lambda: server.num_answered("cancelled") == 8)
    assert server.num_answered("ok") == 1  # which waited for none of the others' last tokens


def test_stalled_readers_do_not_block_others(server: LiveServer) -> None:
    """They use no more than a connection's buffers, and their rows are freed in the end."""

    async def stand_still() -> None:
        body = raw_request(BODY | {"max_tokens": 3000, "stream": True, "logprobs": 20})
        held = []
        for _ in range(7):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server), limit=1)
            writer.write(body)
            held.append((reader, writer))
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            answer = await client.post("/v1/completions", json=BODY)
            assert answer.status_code == 200
        for _, writer in held:
            writer.transport.abort()

    asyncio.run(stand_still())
    server.wait_until_idle()


def test_a_reader_that_stalls_for_long_counts_as_disconnected(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Its session is unlocked and unchanged, though all of its text was generated."""
    settings = tiny_settings(tiny_checkpoint, tmp_path, stall_timeout_s=0.5)
    with (
        live_server(settings, send_buffer_bytes=4096) as running,
        running.client() as client,
    ):
        session_id = client.post("/v1/sessions").json()["id"]
        body = BODY | {"max_tokens": 4_000, "stream": True, "session_id": session_id}

        async def stand_still() -> None:
            narrow = socket.socket()
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            narrow.connect(("127.0.0.1", port_of(running)))
            _, writer = await asyncio.open_connection(sock=narrow, limit=1)
            writer.write(raw_request(body | {"logprobs": 10}))
            await until(lambda: running.num_answered("cancelled") == 1)
            writer.transport.abort()

        asyncio.run(stand_still())
        session = client.get(f"/v1/sessions/{session_id}").json()
        assert (session["status"], session["turn"]) == ("idle", 0)
        running.wait_until_idle()
        assert complete(client, session_id=session_id)["session_turn"] == 1
