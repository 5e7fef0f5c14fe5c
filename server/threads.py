"""Threads shared fairly by several owners."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import TypeVar

R = TypeVar("R")

OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Whose request is being answered."""


class FairThreads:
    """A few threads, for one event loop. When all are busy, waiting owners are served in turn,
    however much work each of them has."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num_free = num_threads
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By owner; the first owner is next."""

        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    async def run(self, owner: str, work: Callable[[], R]) -> R:
        """Run the work in a thread. Raises what the work raises."""
        loop = self._loop = asyncio.get_running_loop()
        if self._num_free and not self._is_closed:
            self._num_free -= 1
        else:
            await self._turn(owner, loop.create_future())
        try:
            begun = self._threads.submit(work)
        except BaseException:
            self._leave()
            raise

        def leave(_: Future[R]) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._leave)

        begun.add_done_callback(leave)  # also if the caller was cancelled
        return await asyncio.wrap_future(begun)

    def close(self) -> None:
        """Wait for running work; drop queued work. Called from another thread."""
        self._is_closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drop)
        self._threads.shutdown(cancel_futures=True)

    async def _turn(self, owner: str, turn: asyncio.Future[None]) -> None:
        if self._is_closed:
            turn.cancel()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            elif turn in self._waiting.get(owner, ()):
                self._remove(owner, turn)
            raise

    def _leave(self) -> None:
        """A thread is free for the next owner."""
        while self._waiting:
            owner, turns = next(iter(self._waiting.items()))
            turn = turns[0]
            self._waiting.move_to_end(owner)
            self._remove(owner, turn)
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._num_free += 1

    def _remove(self, owner: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[owner]
        turns.remove(turn)
        if not turns:
            del self._waiting[owner]

    def _drop(self) -> None:
        for turns in self._waiting.values():
            for turn in turns:
                turn.cancel()
        self._waiting.clear()
