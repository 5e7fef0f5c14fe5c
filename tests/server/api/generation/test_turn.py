"""Whoever sees the end of a turn can take the next one: the session is given back before."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from pydantic import BaseModel

from model import checkpoint
from model.sampling import SamplingParams
from server.api.app import create_app
from server.api.auth import Caller
from server.api.service import Service
from server.api.sse import EventSource
from server.api.turns import ChoiceSpec, Turn
from server.engine.messages import Finished
from server.errors import DeadlineExceeded
from server.sessions.sqlite.store import SQLiteStore
from tests.server.live import tiny_settings

CHOICE = ChoiceSpec((5, 6), 3, SamplingParams(seed=1), ignore_eos=True)


async def take(service: Service, session_id: str) -> list[tuple[bool, bool]]:
    """One turn: at each event, whether it is the last, and whether the session is busy."""
    turn, seen = Turn(service, Caller(), None), list[tuple[bool, bool]]()
    try:
        await turn.resume(session_id)
        await turn.submit([CHOICE])
        async for happened in turn.events():
            assert happened is not None
            for _, event in happened:
                last = isinstance(event, Finished)
                seen.append((last, service.sessions.is_busy(session_id)))
            if last:
                async with service.sessions.turn("", session_id) as following:
                    assert following.record.turn == turn.session_turn
                    assert following.take_warm() is not None
    finally:
        await turn.close()
    return seen


def test_a_session_is_free_when_its_turn_says_that_it_ended(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path)
    loaded = checkpoint.load(tiny_checkpoint, torch.device("cpu"))

    async def main() -> None:
        app = create_app(settings, loaded, SQLiteStore(tmp_path / "sessions"))
        async with app.router.lifespan_context(app):
            service = app.state.service
            session = await service.sessions.create("", {})
            for _ in range(3):
                seen = await take(service, session.id)
                assert seen[-1] == (True, False)
                assert set(seen[:-1]) == {(False, True)}  # texts that waited came together
            assert (await service.sessions.get("", session.id)).turn == 3

    asyncio.run(main())


def test_a_turn_that_failed_is_closed_before_its_client_hears_of_it() -> None:
    happened = list[str]()

    async def messages() -> AsyncIterator[list[BaseModel] | None]:
        yield None
        raise DeadlineExceeded(1.0)

    async def close() -> None:
        happened.append("closed")

    async def main() -> None:
        async for [event] in EventSource(messages(), close).events():
            happened.append("error" if b"deadline_exceeded" in event else "other")

    asyncio.run(main())
    assert happened == ["other", "closed", "error", "other"]
