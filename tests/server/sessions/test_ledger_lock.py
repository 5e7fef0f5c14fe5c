"""Turns wait briefly for a busy session; waiters hold nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from model.state import TensorSpec
from server.errors import NotFound, SessionBusy
from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import Codec
from server.sessions.ledger import Ledger, NextTurn, SessionHead
from server.sessions.quota import Quota, Quotas
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.tiers import Tiers
from tests.patience import PATIENCE_S, until

ME = "me"


@asynccontextmanager
async def ledger_in(folder: Path, session_wait_s: float) -> AsyncIterator[Ledger]:
    store, metrics = SQLiteStore(folder / "sessions.sqlite3"), Metrics()
    codec = Codec("f" * 64, (TensorSpec("m", (2, 3), "float32", 0.0),), 300, "float32 x float32")
    tiers = Tiers(HostCache(0), store, codec.state_bytes, metrics, lambda _: None)
    quota = Quota(store, Quotas())
    yield Ledger(store, tiers, quota, codec, metrics, session_wait_s=session_wait_s)
    await store.close()


@asynccontextmanager
async def busy(ledger: Ledger) -> AsyncIterator[str]:
    """A session in the middle of a turn, until the context ends."""
    session_id = (await ledger.create(ME, {})).id
    async with ledger.begin(ME, SessionHead(session_id), NextTurn()):
        yield session_id


async def turn(ledger: Ledger, session_id: str) -> None:
    async with ledger.begin(ME, SessionHead(session_id), NextTurn()):
        assert ledger.is_busy(session_id)


async def rewind(ledger: Ledger, session_id: str) -> None:
    await ledger.rewind(ME, session_id, 0)


async def delete(ledger: Ledger, session_id: str) -> None:
    await ledger.delete(ME, "session", session_id)


Work = Callable[[Ledger, str], Coroutine[object, object, None]]
WORK = [turn, rewind, delete]


@pytest.mark.parametrize("work", WORK)
def test_it_waits_until_the_session_is_free(tmp_path: Path, work: Work) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path, PATIENCE_S) as ledger:
            async with busy(ledger) as session_id:
                waiting = asyncio.create_task(work(ledger, session_id))
                await until(lambda: ledger._unlocked)
                assert not waiting.done()
            await waiting
            assert not ledger._unlocked
            assert not ledger._open

    asyncio.run(main())


def test_waiting_sequences_take_turns(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path, PATIENCE_S) as ledger:
            async with busy(ledger) as session_id:
                waiting = [asyncio.create_task(turn(ledger, session_id)) for _ in range(5)]
                await until(lambda: ledger._unlocked)
            await asyncio.gather(*waiting)
            assert not ledger._unlocked

    asyncio.run(main())


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("session_wait_s", [0, 0.01])
def test_it_is_refused_when_the_session_stays_busy(
    tmp_path: Path, work: Work, session_wait_s: float
) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path, session_wait_s) as ledger:
            async with busy(ledger) as session_id:
                with pytest.raises(SessionBusy):
                    await work(ledger, session_id)
                assert list(ledger._open) == [session_id]
            assert not ledger._unlocked
            await turn(ledger, session_id)

    asyncio.run(main())


def test_a_cancelled_waiter_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path, PATIENCE_S) as ledger:
            async with busy(ledger) as session_id:
                waiting = asyncio.create_task(turn(ledger, session_id))
                await until(lambda: ledger._unlocked)
                waiting.cancel()
                await asyncio.wait([waiting])
                assert waiting.cancelled()
            assert not ledger._unlocked
            assert not ledger._open
            await turn(ledger, session_id)

    asyncio.run(main())


def test_strangers_learn_nothing_by_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path, PATIENCE_S) as ledger, busy(ledger) as session_id:
            with pytest.raises(NotFound):
                async with ledger.begin("other", SessionHead(session_id), NextTurn()):
                    pass
            with pytest.raises(NotFound):
                await ledger.rewind("other", session_id, 0)
            assert not ledger._unlocked

    asyncio.run(main())
