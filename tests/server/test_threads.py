"""Threads shared by owners serve them in turn, however much work one of them has."""

import asyncio
import threading
from functools import partial

import pytest

from server.threads import FairThreads
from tests.patience import PATIENCE_S


def test_owners_get_a_thread_in_turn() -> None:
    order, free = list[str](), threading.Event()

    async def main() -> None:
        threads = FairThreads(1, "fair")
        first = asyncio.create_task(threads.run("much", lambda: free.wait(PATIENCE_S)))
        await asyncio.sleep(0)
        asked = ["much"] * 5 + ["little", "other", "little"]
        tasks = [asyncio.create_task(threads.run(o, partial(order.append, o))) for o in asked]
        await asyncio.sleep(0)
        free.set()
        await asyncio.gather(first, *tasks)
        threads.close()

    asyncio.run(main())
    assert order[:5] == ["much", "little", "other", "much", "little"]
    assert order[5:] == ["much"] * 3


def test_a_waiter_that_gives_up_runs_no_turn() -> None:
    free = threading.Event()

    async def main() -> None:
        threads = FairThreads(1, "fair")
        first = asyncio.create_task(threads.run("a", lambda: free.wait(PATIENCE_S)))
        await asyncio.sleep(0)
        gone = asyncio.create_task(threads.run("b", int))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        free.set()
        async with asyncio.timeout(PATIENCE_S):
            assert await threads.run("c", lambda: "done") == "done"
        threads.close()

    asyncio.run(main())
