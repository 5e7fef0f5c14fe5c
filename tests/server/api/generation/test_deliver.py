"""Clients that disconnect at any moment: a turn is committed completely or not at all, and leaks
nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response
from starlette.types import Message

from server.api.generation.deliver import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    run_until_disconnect,
)
from server.api.problems import OUTCOME
from server.api.service import Service
from server.errors import LatentdError, StorageFailed
from server.sessions.codec import SessionState
from server.sessions.store import Entry, NewState
from tests.server.api.calls import plain_events
from tests.server.api.generation.services import (
    BODY,
    CALLER,
    Client,
    check_nothing_held,
    complete,
    new_session,
    running_service,
    send,
    state_of,
    tokens_charged,
)
from tests.server.live import tiny_settings

KEY = "turn-1"
USAGE: dict[str, Any] = {
    "stream": True,
    "stream_options": {"continuous_usage_stats": True, "include_usage": True},
}


@dataclass
class World:
    """A service, and the state after its sessions' first turn."""

    service: Service
    after: SessionState

    async def is_committed(self, session_id: str) -> bool:
        """Whether the session is completely at its first turn. Otherwise it is unchanged, and the
        turn can be run with its key."""
        service = self.service
        entry = await service.ledger.get(CALLER.owner, "session", session_id)
        found = await state_of(service, session_id)
        again = await complete(service, Client(), session_id, KEY)
        is_committed = entry.turn == 1
        assert (again.headers.get("Idempotent-Replayed") == "true") is is_committed
        assert json.loads(bytes(again.body))["session_turn"] == 1
        assert await state_of(service, session_id) == self.after
        if is_committed:
            assert found == self.after
        else:
            assert (entry.turn, entry.num_tokens, found) == (0, 0, None)
        return is_committed


@asynccontextmanager
async def world(folder: Path, data: Path, **changes: object) -> AsyncIterator[World]:
    settings = tiny_settings(folder, data, **changes)
    async with running_service(settings, data) as service:
        session_id = await new_session(service)
        await complete(service, Client(), session_id, KEY)
        after = await state_of(service, session_id)
        assert after is not None
        yield World(service, after)


Stored = Callable[..., Awaitable[bool]]


def at_commit(
    service: Service, patch: pytest.MonkeyPatch, act: Callable[[Stored], Awaitable[bool]]
) -> None:
    """Run `act` when the store is about to write a turn."""
    advance = service.ledger._store.advance

    async def advance_with(entry: Entry, state: NewState | None, keep: int) -> bool:
        async def write() -> bool:
            return await advance(entry, state, keep)

        return await act(write)

    patch.setattr(service.ledger._store, "advance", advance_with)


async def let_others_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def stream(world: World, session_id: str, client: Client) -> dict[str, Any]:
    response = await complete(world.service, client, session_id, KEY, **USAGE)
    assert isinstance(response, EventStream)
    return dict(await send(response, client))


def usages(client: Client) -> list[int]:
    """Numbers of generated tokens reported by the events."""
    events = [event for event in plain_events(client.body.decode()) if event != "[DONE]"]
    return [event["usage"]["completion_tokens"] for event in events if event.get("usage")]


@pytest.mark.parametrize("num_messages", range(12))
def test_a_client_leaves_a_stream_after_any_message(
    tiny_checkpoint: Path, tmp_path: Path, num_messages: int
) -> None:
    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            session_id, before = await new_session(w.service), await tokens_charged(w.service)
            client = Client(leaves_after=num_messages)
            scope = await stream(w, session_id, client)
            charged = await tokens_charged(w.service) - before - len(BODY["prompt"])
            await check_nothing_held(w.service)
            assert max(usages(client), default=0) <= charged <= BODY["max_tokens"]
            if await w.is_committed(session_id):
                assert charged == BODY["max_tokens"]
            else:
                assert scope[OUTCOME] == "cancelled"
                assert not client.is_complete

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])
def test_a_client_leaves_at_any_step_of_the_event_loop(
    tiny_checkpoint: Path, tmp_path: Path, streamed: bool, num_steps: int
) -> None:
    """Of a streamed or a whole answer."""

    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            session_id, client = await new_session(w.service), Client()

            async def answer() -> Response:
                response = await complete(w.service, client, session_id, KEY, stream=streamed)
                await send(response, client)
                return response

            answering = asyncio.create_task(answer())
            for _ in range(num_steps):
                await asyncio.sleep(0)
            client.leave()
            response = await answering
            await check_nothing_held(w.service)
            is_committed = await w.is_committed(session_id)
            if not is_committed and not streamed:
                assert response.status_code == CLIENT_CLOSED_REQUEST
            if response.status_code == 200 and client.is_complete:
                assert is_committed

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "fails"])
def test_a_client_leaves_while_its_turn_is_committed(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    streamed: bool,
) -> None:
    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            session_id, client = await new_session(w.service), Client()
            before = await tokens_charged(w.service)

            async def leave(write: Stored) -> bool:
                written = when == "after" and await write()
                client.leave()
                await let_others_run()
                assert w.service.ledger.is_busy(session_id)
                if when == "fails":
                    raise StorageFailed("no")
                return written or await write()

            with monkeypatch.context() as patch:
                at_commit(w.service, patch, leave)
                response = await complete(w.service, client, session_id, KEY, stream=streamed)
                await send(response, client)
            await check_nothing_held(w.service)
            assert await tokens_charged(w.service) == before + 2 + BODY["max_tokens"]
            assert await w.is_committed(session_id) is (when != "fails")

    asyncio.run(main())


def test_a_turn_is_closed_before_its_failure_is_reported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listener(Client):
        def __init__(self, service: Service) -> None:
            super().__init__()
            self._service = service

        async def send(self, message: Message) -> None:
            if b"storage_failed" in message.get("body", b""):
                assert not self._service.ledger._open
                assert not self._service.open_turns._turns
            await super().send(message)

    async def fail(write: Stored) -> bool:
        del write
        raise StorageFailed("no")

    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            session_id, client = await new_session(w.service), Listener(w.service)
            with monkeypatch.context() as patch:
                at_commit(w.service, patch, fail)
                scope = await stream(w, session_id, client)
            *texts, error, done = plain_events(client.body.decode())
            assert (error["error"]["code"], done) == ("storage_failed", "[DONE]")
            assert not [t for t in texts if t["choices"] and t["choices"][0]["finish_reason"]]
            assert (scope[OUTCOME], client.is_complete) == ("server_error", True)
            await check_nothing_held(w.service)
            assert not await w.is_committed(session_id)

    asyncio.run(main())


@pytest.mark.parametrize("num_steps", range(4))
def test_a_stream_that_is_cancelled_before_it_began_closes_its_turn(
    tiny_checkpoint: Path, tmp_path: Path, num_steps: int
) -> None:
    """As when a server cancels the connection's task."""

    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            session_id, client = await new_session(w.service), Client()
            response = await complete(w.service, client, session_id, KEY, stream=True)
            assert w.service.ledger.is_busy(session_id)
            sending = asyncio.create_task(send(response, client))
            for _ in range(num_steps + 1):  # a task that never began has no part in this
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await check_nothing_held(w.service)
            await w.is_committed(session_id)

    asyncio.run(main())


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_costs_what_was_generated(
    tiny_checkpoint: Path, tmp_path: Path, streamed: bool, num_choices: int
) -> None:
    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            before, client = await tokens_charged(w.service), Client()
            how: dict[str, Any] = USAGE if streamed else {}
            response = await complete(w.service, client, n=num_choices, stop=["e"], **how)
            await send(response, client)
            if streamed:
                generated = usages(client)[-1]
            else:
                generated = json.loads(client.body)["usage"]["completion_tokens"]
            spent = await tokens_charged(w.service) - before
            assert spent == num_choices * len(BODY["prompt"]) + generated
            assert client.is_complete

    asyncio.run(main())


def test_a_cancelled_turn_costs_what_was_delivered(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tiny_checkpoint, tmp_path) as w:
            before, generated = await tokens_charged(w.service), w.service.metrics
            engine = generated.generation_tokens_total._value.get()
            client = Client(leaves_after=30)
            response = await complete(w.service, client, max_tokens=60_000, **USAGE)
            await send(response, client)
            await check_nothing_held(w.service)
            spent = await tokens_charged(w.service) - before - len(BODY["prompt"])
            most = generated.generation_tokens_total._value.get() - engine
            assert 20 < usages(client)[-1] <= spent <= most

    asyncio.run(main())


def test_no_one_waits_for_a_disconnected_client() -> None:
    ended = list[str]()

    async def work(name: str, error: Exception | None = None) -> None:
        try:
            if error is not None:
                raise error
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def short() -> None:
        ended.append("short")

    async def main() -> None:
        here, gone = Client(), Client(leaves_after=0)
        assert await run_until_disconnect(here.receive, short())
        assert not await run_until_disconnect(gone.receive, work("long"))
        with pytest.raises(LatentdError):
            await run_until_disconnect(here.receive, work("failed", StorageFailed("no")))
        assert ended == ["short", "long", "failed"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
