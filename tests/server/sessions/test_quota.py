"""Quotas: requests above them are rejected before any work, and usage is exact to the byte."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server.errors import LatentdError, QuotaExceeded, StorageFull
from server.sessions.quota import Quotas
from server.sessions.store import Entry
from tests.server.sessions.worlds import CODEC, ME, body, state, world

BLOB = CODEC.encode(state())
SPACE = CODEC.typical_blob_bytes


async def refused(what: Awaitable[object], code: str) -> LatentdError:
    with pytest.raises((QuotaExceeded, StorageFull)) as caught:
        await what
    assert caught.value.code == code
    assert caught.value.headers["x-should-retry"] == "false"
    return caught.value


@pytest.mark.parametrize(
    ("quotas", "status", "code"),
    [
        (Quotas(sessions_per_owner=2), 429, "session_quota_exceeded"),
        (Quotas(sessions=2), 507, "storage_full"),
    ],
)
def test_the_number_of_sessions_is_limited(
    tmp_path: Path, quotas: Quotas, status: int, code: str
) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=quotas) as w:
            first, second = await w.new(), await w.new()
            await w.advance(first, state())
            makers: list[Callable[[], Awaitable[object]]] = [
                lambda: w.ledger.create(ME, {}),
                lambda: w.ledger.fork(ME, first, None),
                lambda: w.ledger.import_blob(ME, BLOB, {}, None),
            ]
            for make in makers:
                error = await refused(make(), code)
                assert error.status == status
                assert "2" in error.message
            assert len(await w.ledger.list(ME, "session", 10, None)) == 2
            if quotas.sessions is None:
                await w.ledger.create("another", {})
            await w.advance(second, state())
            await w.delete(second)
            await w.new()

    asyncio.run(main())


@pytest.mark.parametrize("everybodys", [False, True])
def test_the_number_of_bytes_is_limited(tmp_path: Path, everybodys: bool) -> None:
    most = SPACE + len(BLOB) + 50
    quotas = Quotas(bytes=most) if everybodys else Quotas(bytes_per_owner=most)
    code = "storage_full" if everybodys else "session_bytes_quota_exceeded"

    async def main() -> None:
        async with world(tmp_path, quotas=quotas, keep_turns=2) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"))
            for _ in range(3):  # it has its checkpoints: the next ones take the oldest one's place
                await w.advance(name, state(b"c"))
            other = await w.new()
            await refused(w.advance(other, state()), code)
            await refused(w.ledger.fork(ME, name, None), code)
            fits = most - (await w.store.usage(ME)).num_bytes
            assert 0 < len(BLOB) - fits < len(BLOB)
            await refused(w.ledger.import_blob(ME, BLOB, {}, None), code)
            assert (await w.get(other)).turn == 0
            assert not w.ledger.is_busy(other)
            await w.ledger.rewind(ME, name, 0)
            await w.advance(other, state())

    asyncio.run(main())


def test_turns_that_run_together_do_not_share_the_last_space(tmp_path: Path) -> None:
    async def main() -> None:
        quotas = Quotas(bytes_per_owner=2 * SPACE)
        async with world(tmp_path, quotas=quotas) as w:
            names = [await w.new() for _ in range(5)]
            answers = await asyncio.gather(
                *(w.advance(name, state()) for name in names), return_exceptions=True
            )
            kinds = [type(answer) for answer in answers]
            assert kinds.count(QuotaExceeded) == 3
            assert (await w.store.usage(ME)).num_bytes == 2 * len(BLOB)
            await w.delete(names[kinds.index(Entry)])
            left = names[kinds.index(QuotaExceeded)]
            for _ in range(3):
                async with w.next_turn(left):
                    pass  # the space of turns that came to nothing is free again
            await w.advance(left, state())

    asyncio.run(main())


def test_a_limit_of_nothing_is_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(sessions_per_owner=0)) as w:
            await refused(w.new(), "session_quota_exceeded")
        async with world(tmp_path, quotas=Quotas(bytes=0)) as w:
            await refused(w.advance(await w.new(), state()), "storage_full")

    asyncio.run(main())


def test_the_number_of_responses_is_limited(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(responses_per_owner=2)) as w:
            await w.respond("a", b"a")
            async with w.making("b") as turn:  # counts before and after it is stored
                for is_stored in (False, True):
                    if is_stored:
                        await turn.store_pending(body("queued"))
                    error = await refused(w.respond("c", b"c"), "response_quota_exceeded")
                    assert "responses" in error.message
                for _ in range(3):
                    await w.new()  # a session is no response
            await w.delete_response("a")
            answers = await asyncio.gather(
                *(w.respond(f"{number}", b"n") for number in range(4)), return_exceptions=True
            )
            assert [type(answer) for answer in answers].count(QuotaExceeded) == 3

    asyncio.run(main())


def test_a_response_in_the_background_counts_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(responses_per_owner=3)) as w:
            await w.respond("a", b"a")
            async with w.making("b") as turn:
                await turn.store_pending(body("queued"))
                await w.respond("c", b"c")
                error = await refused(w.respond("d", b"d"), "response_quota_exceeded")
                assert "3 stored responses" in error.message

    asyncio.run(main())


@pytest.mark.parametrize("everybodys", [False, True])
def test_bytes_of_responses_are_those_of_the_sessions_too(tmp_path: Path, everybodys: bool) -> None:
    most = 2 * SPACE
    quotas = Quotas(bytes=most) if everybodys else Quotas(bytes_per_owner=most)
    code = "storage_full" if everybodys else "session_bytes_quota_exceeded"

    async def main() -> None:
        async with world(tmp_path, quotas=quotas) as w:
            name = await w.new()
            await w.respond("a", b"a")
            async with w.making("b") as turn:
                await turn.store_pending(body("queued", text="x" * 8000))
            for call in (w.respond("c", b"c"), w.advance(name, state(b"s"))):
                await refused(call, code)
            await w.delete_response("b")
            async with w.next_turn(name):
                await refused(w.respond("c", b"c"), code)  # the session's turn has reserved it
            await w.respond("c", b"c")

    asyncio.run(main())


def test_a_turn_of_which_nothing_is_kept_needs_no_space(tmp_path: Path) -> None:
    async def main() -> None:
        quotas = Quotas(sessions=0, bytes=0, responses_per_owner=0, bytes_per_owner=0)
        async with world(tmp_path, quotas=quotas) as w, w.turn(None, None) as turn:
            assert await turn.load() is None

    asyncio.run(main())
