"""Limits: what is over them is refused before any work, and counted to the byte."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server.errors import LatentdError, QuotaExceeded, StorageFull
from server.sessions.quota import Quotas
from server.sessions.store import SessionRecord
from tests.server.sessions.worlds import CODEC, ME, state, world

BLOB = CODEC.encode(state())
ROOM = CODEC.usual_blob_bytes


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
def test_there_are_at_most_so_many_sessions(
    tmp_path: Path, quotas: Quotas, status: int, code: str
) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=quotas) as w:
            first, second = await w.new(), await w.new()
            await w.advance(first, state())
            makers: list[Callable[[], Awaitable[object]]] = [
                lambda: w.sessions.create(ME, {}),
                lambda: w.sessions.fork(ME, first, None),
                lambda: w.sessions.import_blob(ME, BLOB, {}, None),
            ]
            for make in makers:
                error = await refused(make(), code)
                assert error.status == status
                assert "2" in error.message
            assert len(await w.sessions.list(ME, 10, None)) == 2
            if quotas.sessions is None:
                await w.sessions.create("another", {})
            await w.advance(second, state())
            await w.delete(second)
            await w.new()

    asyncio.run(main())


@pytest.mark.parametrize("everybodys", [False, True])
def test_there_are_at_most_so_many_bytes(tmp_path: Path, everybodys: bool) -> None:
    most = ROOM + len(BLOB) + 50
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
            await refused(w.sessions.fork(ME, name, None), code)
            fits = most - (await w.store.usage(ME)).num_bytes
            assert 0 < len(BLOB) - fits < len(BLOB)
            await refused(w.sessions.import_blob(ME, BLOB, {}, None), code)
            assert (await w.get(other)).turn == 0
            assert not w.sessions.is_busy(other)
            await w.sessions.rewind(ME, name, 0)
            await w.advance(other, state())

    asyncio.run(main())


def test_turns_that_run_together_do_not_share_the_last_room(tmp_path: Path) -> None:
    async def main() -> None:
        quotas = Quotas(bytes_per_owner=2 * ROOM)
        async with world(tmp_path, quotas=quotas) as w:
            names = [await w.new() for _ in range(5)]
            answers = await asyncio.gather(
                *(w.advance(name, state()) for name in names), return_exceptions=True
            )
            kinds = [type(answer) for answer in answers]
            assert kinds.count(QuotaExceeded) == 3
            assert (await w.store.usage(ME)).num_bytes == 2 * len(BLOB)
            await w.delete(names[kinds.index(SessionRecord)])
            left = names[kinds.index(QuotaExceeded)]
            for _ in range(3):
                async with w.sessions.turn(ME, left):
                    pass  # the room of turns that came to nothing is free again
            await w.advance(left, state())

    asyncio.run(main())


def test_a_limit_of_nothing_is_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(sessions_per_owner=0)) as w:
            await refused(w.new(), "session_quota_exceeded")
        async with world(tmp_path, quotas=Quotas(bytes=0)) as w:
            await refused(w.advance(await w.new(), state()), "storage_full")

    asyncio.run(main())
