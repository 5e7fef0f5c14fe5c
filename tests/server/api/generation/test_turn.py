"""A turn: opened or rejected, committed or abandoned, and the resources it holds meanwhile."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.api.auth import Caller
from server.api.generation.answer import Answer
from server.api.generation.generation import Generation, read_generation
from server.api.generation.prompts import TextPrompt
from server.api.generation.turn import AdmittedTurn, Replay, open_turn, run_to_end
from server.api.schemas.completions import CompletionRequest
from server.api.service import Service
from server.engine.messages import Finished
from server.errors import (
    InvalidRequest,
    LatentdError,
    NotFound,
    Overloaded,
    RateLimited,
    SessionBusy,
    ShuttingDown,
    StorageFailed,
)
from server.keys import Limits
from server.sessions.ledger import NewResponse, NextTurn, SessionHead, Source, Target
from server.sessions.store import Entry, NewState
from tests.server.api.generation.services import (
    BODY,
    CALLER,
    check_nothing_held,
    new_session,
    running_service,
    state_of,
    tokens_charged,
)
from tests.server.live import tiny_settings


async def opened(
    service: Service,
    source: Source = None,
    target: Target = None,
    pending_body: str | None = None,
    *,
    caller: Caller = CALLER,
    is_detached: bool = False,
    **changes: object,
) -> AdmittedTurn | Replay:
    body = CompletionRequest.model_validate(BODY | changes)
    generation = await read_generation(service, body, is_detached=is_detached)
    prompt = TextPrompt(service, body.prompts)
    return await open_turn(service, caller, source, target, generation, prompt, pending_body)


async def admitted(service: Service, *args: Any, **changes: Any) -> AdmittedTurn:
    turn = await opened(service, *args, **changes)
    assert isinstance(turn, AdmittedTurn)
    return turn


async def run(service: Service, turn: AdmittedTurn, body: str | None = None) -> Answer:
    """Run to the end, and close."""
    answer = Answer(turn, service.checkpoint.tokenizer, "cmpl-1")
    async for events in turn.events():
        for event in events or ():
            answer.add(*event)
    await turn.commit(body, answer.num_generated)
    await turn.close(None, answer.num_generated)
    return answer


def test_a_session_is_free_as_soon_as_its_turn_is_committed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            session_id = await new_session(service)
            for number in range(1, 4):
                turn = await admitted(service, SessionHead(session_id), NextTurn())
                assert (turn.session_id, turn.session_turn) == (session_id, number)
                async for events in turn.events():
                    assert service.ledger.is_busy(session_id)
                    last = [event for _, event in events or () if isinstance(event, Finished)]
                with pytest.raises(SessionBusy):
                    await opened(service, SessionHead(session_id), NextTurn())
                assert last
                await turn.commit(None, 6)
                assert not service.ledger.is_busy(session_id)
                assert not service.limiter._running
                entry = await service.ledger.get("", "session", session_id)
                assert (entry.turn, entry.state_id) == (number, turn.retain_as)
                assert service.ledger.tier(entry) == "device"
                await turn.close(None, 6)
            await check_nothing_held(service)

    asyncio.run(main())


def test_an_answer_that_is_known_is_not_generated_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            session_id = await new_session(service)
            target = NextTurn("key", "request")
            turn = await admitted(service, SessionHead(session_id), target)
            assert turn.needs_body
            await run(service, turn, "the answer")
            charged = await tokens_charged(service)
            assert await opened(service, SessionHead(session_id), target) == Replay("the answer")
            assert await tokens_charged(service) == charged
            await check_nothing_held(service)

    asyncio.run(main())


REFUSALS: list[tuple[type[LatentdError], dict[str, Any]]] = [
    (NotFound, {"source": SessionHead("sess_none"), "target": NextTurn()}),
    (InvalidRequest, {"prompt": []}),
    (InvalidRequest, {"prompt": [5] * 99}),
    (RateLimited, {"caller": Caller(limits=Limits(tokens_per_minute=8))}),
    (InvalidRequest, {"caller": Caller(limits=Limits(tokens_per_minute=1))}),
    (Overloaded, {"n": 3}),
    (Overloaded, {"is_detached": True}),
]


@pytest.mark.parametrize(("error", "changes"), REFUSALS)
def test_a_turn_that_is_refused_holds_and_costs_nothing(
    tiny_checkpoint: Path, tmp_path: Path, error: type[LatentdError], changes: dict[str, Any]
) -> None:
    few = {"max_running": 1, "max_waiting": 3, "max_prompt_tokens": 50, "max_resumable_streams": 0}
    settings = tiny_settings(tiny_checkpoint, tmp_path, **few)

    async def main() -> None:
        async with running_service(settings, tmp_path) as service:
            if error is RateLimited:  # by what the one before has used
                await run(service, await admitted(service, caller=changes["caller"]))
            busy = [await admitted(service, max_tokens=60_000) for _ in range(3)]
            charged = await tokens_charged(service)
            with pytest.raises(error):
                await opened(service, **changes)
            assert await tokens_charged(service) == charged
            assert service.open_turns._turns == set(busy)
            for turn in busy:
                await turn.close(None, 0)
            await check_nothing_held(service)

    asyncio.run(main())


def test_a_response_whose_beginning_cannot_be_stored_is_not_made(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def insert(entry: Entry, state: NewState | None = None) -> None:
        del entry, state
        raise StorageFailed("no")

    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            monkeypatch.setattr(service.ledger._store, "insert", insert)
            pending = '{"status": "in_progress"}'
            with pytest.raises(StorageFailed):
                await opened(service, None, NewResponse("resp_1"), pending, max_tokens=60_000)
            await check_nothing_held(service)

    asyncio.run(main())


def test_no_turn_begins_once_the_server_drains(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that is just being opened."""

    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            session_id = await new_session(service)
            get = service.ledger._store.get

            async def drain_meanwhile(kind: Any, entry_id: str) -> Entry | None:
                await service.drain()
                return await get(kind, entry_id)

            monkeypatch.setattr(service.ledger._store, "get", drain_meanwhile)
            with pytest.raises(ShuttingDown):
                await opened(service, SessionHead(session_id), NextTurn())
            await check_nothing_held(service)

    asyncio.run(main())


def test_turns_that_open_together_are_no_more_streams_than_may_run(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, max_resumable_streams=2)

    async def main() -> None:
        async with running_service(settings, tmp_path) as service:
            heads = [SessionHead(await new_session(service)) for _ in range(5)]
            opening = (
                opened(service, head, NextTurn(), is_detached=True, max_tokens=60_000)
                for head in heads
            )
            done = await asyncio.gather(*opening, return_exceptions=True)
            running = [turn for turn in done if isinstance(turn, AdmittedTurn)]
            refused = [error for error in done if isinstance(error, Overloaded)]
            assert (len(running), len(refused)) == (2, 3)
            assert {error.code for error in refused} == {"too_many_streams"}
            await running[0].close(None, 0)
            running.append(await admitted(service, is_detached=True, max_tokens=60_000))
            for turn in running:
                await turn.close(None, 0)
            await check_nothing_held(service)

    asyncio.run(main())


@pytest.mark.parametrize("pending", [False, True])
def test_a_caller_cancelled_while_a_turn_opens_holds_nothing(
    tiny_checkpoint: Path, tmp_path: Path, pending: bool
) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            session_id = await new_session(service)
            for num_steps in range(40):
                way: dict[str, Any] = {"source": SessionHead(session_id), "target": NextTurn()}
                if pending:
                    target = NewResponse(f"resp_{num_steps}")
                    way = {"target": target, "pending_body": '{"status": "in_progress"}'}
                opening = asyncio.create_task(opened(service, **way, max_tokens=60_000))
                for _ in range(num_steps):
                    await asyncio.sleep(0)
                opening.cancel()
                [turn] = await asyncio.gather(opening, return_exceptions=True)
                if isinstance(turn, AdmittedTurn):
                    await turn.close(None, 0)
                else:
                    assert isinstance(turn, asyncio.CancelledError)
                await check_nothing_held(service)
            assert await state_of(service, session_id) is None

    asyncio.run(main())


def test_what_was_generated_is_charged_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            turn = await admitted(service, n=3)
            assert await tokens_charged(service) == 3 * 2
            answer = await run(service, turn)
            assert answer.num_generated == 3 * 6
            assert await tokens_charged(service) == 3 * (2 + 6)
            await turn.close(None, 1000)
            assert await tokens_charged(service) == 3 * (2 + 6)

    asyncio.run(main())


def test_choices_have_requests_of_their_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            turn = await admitted(service, prompt=[[5, 6], [7]], n=2)
            requests = turn.requests
            assert [request.token_ids for request in requests] == [(5, 6), (5, 6), (7,), (7,)]
            assert len({request.request_id for request in requests}) == 4
            seeds = [request.sampling.seed for request in requests]
            assert seeds[:2] == seeds[2:]
            assert len(set(seeds)) == 2
            assert {request.retain_as for request in requests} == {None}
            await turn.close(None, 0)

    asyncio.run(main())


def test_an_incomplete_character_only_matters_if_the_text_continues(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with running_service(tiny_settings(tiny_checkpoint, tmp_path), tmp_path) as service:
            body = CompletionRequest.model_validate(BODY)
            generation: Generation = await read_generation(service, body)
            turn = await admitted(service)
            start = replace(turn.start, position=3, pending=(7,), undecoded=b"\xe2")
            common: dict[str, Any] = {"owner": "me", "retain_as": "x", "deadline": None}
            behind, after = generation.requests([(), (5,)], start, None, **common)
            assert (behind.continuation.undecoded, after.continuation.undecoded) == (b"\xe2", b"")
            assert (behind.owner, behind.retain_as) == ("me", "x")
            await turn.close(None, 0)

    asyncio.run(main())


class Work:
    """Work that blocks at a step in the middle."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        self.is_done = False
        self._error = error

    async def run(self) -> None:
        self.reached.set()
        await self.go.wait()
        self.is_done = True
        if self._error is not None:
            raise self._error


def run_cancelled(work: Work, num_cancelled: int) -> Coroutine[Any, Any, Any]:
    async def main() -> Any:
        task = asyncio.create_task(run_to_end(work.run()))
        await work.reached.wait()
        for _ in range(num_cancelled):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        work.go.set()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        return outcome

    return main()


@pytest.mark.parametrize("num_cancelled", [0, 1, 3])
@pytest.mark.parametrize("error", [None, StorageFailed("no")])
def test_what_must_end_ends_however_often_its_caller_is_cancelled(
    num_cancelled: int, error: Exception | None
) -> None:
    async def main() -> None:
        work = Work(error)
        outcome = await run_cancelled(work, num_cancelled)
        assert work.is_done
        if num_cancelled:
            assert isinstance(outcome, asyncio.CancelledError)
        else:
            assert outcome is error

    asyncio.run(main())
