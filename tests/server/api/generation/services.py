"""A service in the test's own event loop, and clients that disconnect at a chosen moment."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import Request, Response
from starlette.types import Message, Scope

from model import checkpoint
from server.api.app import create_app
from server.api.auth import Caller
from server.api.generation.completion_shape import CompletionShape
from server.api.generation.prompts import TextPrompt
from server.api.generation.session_turn import SessionHeaders, answer_turn
from server.api.schemas.completions import CompletionRequest
from server.api.service import Service
from server.errors import NotFound
from server.keys import Limits
from server.sessions.codec import SessionState
from server.sessions.sqlite.store import SQLiteStore
from server.settings import Settings

BODY: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 6, "seed": 1, "ignore_eos": True}
PATIENCE_S = 60.0
CALLER = Caller(limits=Limits(tokens_per_minute=10**9, concurrent_requests=100))


@asynccontextmanager
async def running_service(settings: Settings, folder: Path) -> AsyncIterator[Service]:
    """The parts of a server, without a socket."""
    loaded = checkpoint.load(settings.checkpoint, torch.device("cpu"))
    app = create_app(settings, loaded, SQLiteStore(folder / "sessions.sqlite3"))
    async with app.router.lifespan_context(app):
        service = app.state.service
        assert isinstance(service, Service)
        yield service


class Client:
    """A client's connection, as an ASGI server presents it."""

    def __init__(self, leaves_after: int | None = None) -> None:
        """Disconnects after receiving this many messages; None: never."""
        self.messages = list[Message]()
        self._leaves_after = leaves_after
        self._gone = asyncio.Event()
        if leaves_after == 0:
            self.leave()

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if len(self.messages) == self._leaves_after:
            self.leave()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_complete(self) -> bool:
        """Whether the response came to its end."""
        [last] = self.messages[-1:] or [{"type": "nothing"}]
        return last["type"] == "http.response.body" and not last.get("more_body", False)


async def complete(
    service: Service,
    client: Client,
    session_id: str | None = None,
    key: str | None = None,
    **changes: object,
) -> Response:
    """Start a completion, up to where its response can be sent."""
    body = CompletionRequest.model_validate(BODY | changes)
    request = Request(scope_of(), client.receive)
    given = SessionHeaders(session_id, key)
    prompt = TextPrompt(service, body.prompts)
    return await answer_turn(request, service, CALLER, body, given, prompt, CompletionShape)


async def send(response: Response, client: Client) -> Scope:
    """Send a response until it ends or the client disconnects. Returns the request's scope."""
    scope = scope_of()
    await response(scope, client.receive, client.send)
    return scope


def scope_of() -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


async def new_session(service: Service) -> str:
    return (await service.ledger.create(CALLER.owner, {})).id


async def state_of(service: Service, session_id: str) -> SessionState | None:
    """The session's stored state; None before its first turn."""
    try:
        _, _, blob = await service.ledger.export(CALLER.owner, session_id, None)
    except NotFound:
        return None
    return service.ledger._codec.decode(blob)


async def tokens_charged(service: Service) -> int:
    headers = await service.limiter.headers(CALLER)
    limit, remaining = (headers[f"x-ratelimit-{what}-tokens"] for what in ("limit", "remaining"))
    return int(limit) - int(remaining)


async def check_nothing_held(service: Service) -> None:
    """Nothing is locked, charged, subscribed or running, and all rows are accounted for."""
    assert not service.ledger._open
    assert not service.ledger._quota._reserved
    assert not service.limiter._running
    assert not service.router._queues
    assert not service.open_turns._turns
    metrics = service.metrics
    async with asyncio.timeout(PATIENCE_S):
        while True:
            running, warm = (
                metrics.slots.labels(state=state)._value.get() for state in ("running", "warm")
            )
            waiting = metrics.requests_waiting._value.get()
            if not running and not waiting and warm == len(service.ledger.tiers._rows):
                return
            await asyncio.sleep(0.001)
