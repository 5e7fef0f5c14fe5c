"""Turns without a connection: whenever they are cancelled, all reports agree."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from server.api.generation.answer import Answer
from server.api.responses import cancel_response, create_response, get_response
from server.api.schemas.responses import ResponseRequest
from server.api.service import Service
from server.api.streams import Stream
from server.errors import StorageFailed
from server.sessions.store import Entry, NewState
from tests.server.api.chats import make_checkpoint
from tests.server.api.generation.services import (
    CALLER,
    Client,
    check_nothing_held,
    complete,
    new_session,
    running_service,
    scope_of,
    state_of,
)
from tests.server.live import tiny_settings

BODY: dict[str, Any] = {"input": "the cat", "max_output_tokens": 8, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "model")


@asynccontextmanager
async def service_of(folder: Path, data: Path) -> AsyncIterator[Service]:
    async with running_service(tiny_settings(folder, data), data) as service:
        yield service


async def respond(service: Service, **changes: object) -> Stream:
    """A background response."""
    body = ResponseRequest.model_validate(BODY | {"background": True} | changes)
    request = Request(scope_of(), Client().receive)
    made = await create_response(body, request, service, CALLER)
    first = json.loads(bytes(made.body))
    assert (first["status"], first["output"]) == ("in_progress", [])
    return service.streams.get(CALLER.owner, first["id"])


async def stored(service: Service, response_id: str) -> dict[str, Any]:
    found = await get_response(response_id, service, CALLER)
    return dict(json.loads(bytes(found.body)))


async def last_event(stream: Stream) -> dict[str, Any]:
    events = b"".join([events async for events in stream.log.follow(0, 60)]).decode()
    last = events.removesuffix("\n\n").split("\n\n")[-1]
    fields = dict(line.split(": ", 1) for line in last.split("\n"))
    return dict(json.loads(fields["data"]))


async def check_agrees(service: Service, stream: Stream) -> str:
    """The stored response agrees with the last event and the stream's status. Returns its
    status."""
    await check_nothing_held(service)
    found = await stored(service, stream.id)
    assert (await last_event(stream))["response"] == found
    statuses = {"incomplete": "completed", "cancelled": "cancelled", "failed": "failed"}
    assert stream.status == statuses[found["status"]]
    entry = await service.ledger.get(CALLER.owner, "response", stream.id)
    assert (entry.state_id is not None) == (found["status"] == "incomplete")
    return str(found["status"])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
def test_a_response_is_cancelled_at_any_step(folder: Path, tmp_path: Path, num_steps: int) -> None:
    async def main() -> None:
        async with service_of(folder, tmp_path) as service:
            stream = await respond(service)
            for _ in range(num_steps):
                await asyncio.sleep(0)
            answer = await cancel_response(stream.id, service, CALLER.owner)
            assert json.loads(bytes(answer.body)) == await stored(service, stream.id)
            assert await check_agrees(service, stream) in ("cancelled", "incomplete")

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after", "fails"])
def test_a_response_is_cancelled_while_it_is_committed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What is complete on disk is complete; what could not be written is cancelled."""

    async def main() -> None:
        async with service_of(folder, tmp_path) as service:
            advance, reached = service.ledger._store.advance, asyncio.Event()
            go = asyncio.Event()

            async def advance_late(entry: Entry, state: NewState | None, keep: int) -> bool:
                if state is None:
                    return await advance(entry, state, keep)
                written = when == "after" and await advance(entry, state, keep)
                reached.set()
                await go.wait()
                if when == "fails":
                    raise StorageFailed("no")
                return written or await advance(entry, state, keep)

            monkeypatch.setattr(service.ledger._store, "advance", advance_late)
            stream = await respond(service)
            await reached.wait()
            cancelling = asyncio.create_task(stream.cancel())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not cancelling.done()
            go.set()
            await cancelling
            status = await check_agrees(service, stream)
            assert status == ("cancelled" if when == "fails" else "incomplete")

    asyncio.run(main())


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
def test_a_resumable_turn_is_cancelled_at_any_step(
    folder: Path, tmp_path: Path, num_steps: int
) -> None:
    async def main() -> None:
        async with service_of(folder, tmp_path) as service:
            session_id = await new_session(service)
            how = {"stream": True, "resumable": True}
            response = await complete(service, Client(), session_id, "key", **how)
            stream = service.streams.get(CALLER.owner, response.headers["X-Stream-ID"])
            for _ in range(num_steps):
                await asyncio.sleep(0)
            await stream.cancel()
            await check_nothing_held(service)
            text = b"".join([events async for events in stream.log.follow(0, 60)]).decode()
            assert text.endswith(f"data: [DONE]\nid: {stream.log.num_events - 1}\n\n")
            is_committed = await state_of(service, session_id) is not None
            assert stream.status == ("completed" if is_committed else "cancelled")
            assert ('"code":"cancelled"' in text) is not is_committed
            assert ('"session_turn":1' in text) is is_committed

    asyncio.run(main())


def test_a_fault_of_the_server_is_stored_as_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with service_of(folder, tmp_path) as service:

            def fail(answer: Answer, index: int, event: object) -> None:
                del answer, index, event
                raise ValueError("a fault")

            monkeypatch.setattr(Answer, "add", fail)
            stream = await respond(service)
            assert stream._task is not None
            [fault] = await asyncio.gather(stream._task, return_exceptions=True)
            assert isinstance(fault, ValueError)
            await check_nothing_held(service)
            found = await stored(service, stream.id)
            assert (found["status"], found["error"]["code"]) == ("failed", "internal_error")
            assert stream.status == "failed"

    asyncio.run(main())
