"""Supervises the front processes: starts them, restarts those that exit, stops them."""

import asyncio
import logging
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from server.connections import SETTINGS
from server.fronts.frames import FrameKind
from server.fronts.front_connection import App, FrontConnection
from server.settings import Settings

START_S = 60
"""Time limit for the fronts to be ready."""

EXTRA_S = 2
"""Time for a front to exit after the time limit of its last responses."""

SHORT_LIFE_S = 5.0
"""Delay before restarting a front that lived for less than this: the next would probably fail,
too."""

PAUSE_S = 1.0
PING_S = 1.0
HUNG_S = 10.0
"""A front that has not replied for this long is considered hung, and is killed and replaced."""

log = logging.getLogger(__name__)


class FrontError(Exception):
    """A front exited before it was ready."""


class Supervisor:
    """Supervises one front process per listening socket."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        listeners: Sequence[socket.socket],
        last_bytes_s: int,
        tasks: set[asyncio.Task[None]],
    ) -> None:
        """Requests run as `tasks`; on shutdown, responses have `last_bytes_s` to reach their
        clients."""
        self._app = app
        self._settings = settings.model_dump_json(include={*SETTINGS, "log_level", "log_format"})
        self._listeners = listeners
        self._last_bytes_s = last_bytes_s
        self._tasks = tasks
        self._tasks_of_fronts: list[asyncio.Task[None]] = []
        self._fronts: dict[Process, FrontConnection] = {}
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Start all and wait until they are listening. Raises FrontError."""
        loop = asyncio.get_running_loop()
        ready = [loop.create_future() for _ in self._listeners]
        self._tasks_of_fronts = [
            asyncio.create_task(self._keep(*pair))
            for pair in zip(self._listeners, ready, strict=True)
        ]
        try:
            async with asyncio.timeout(START_S):
                await asyncio.gather(*ready)
        except TimeoutError:
            raise FrontError(f"a front process was not ready within {START_S} s") from None

    async def stop(self) -> None:
        """Let all fronts deliver the responses in progress, and stop them."""
        self._stopping.set()
        for listener in self._listeners:
            listener.close()
        for connection in self._fronts.values():
            connection.link.send(FrameKind.STOP)
        if self._tasks_of_fronts:
            await asyncio.wait(self._tasks_of_fronts, timeout=self._last_bytes_s + EXTRA_S)
        for process in self._fronts:
            log.error("front process %d does not exit: killing it", process.pid)
            with suppress(ProcessLookupError):
                process.kill()
        for keeping in self._tasks_of_fronts:
            keeping.cancel()
        await asyncio.gather(*self._tasks_of_fronts, return_exceptions=True)

    async def _keep(self, listener: socket.socket, ready: asyncio.Future[None]) -> None:
        while not self._stopping.is_set():
            started = monotonic()
            status, pid = await self._run_front(listener, ready)
            if self._stopping.is_set():
                return
            if not ready.done():
                ready.set_exception(FrontError(f"a front process exited with status {status}"))
                return
            log.error("front process %d exited with status %d: restarting it", pid, status)
            if monotonic() - started < SHORT_LIFE_S:
                await asyncio.sleep(PAUSE_S)

    async def _watch(
        self, process: Process, connection: FrontConnection, ready: asyncio.Future[None]
    ) -> None:
        """Kill a front that hangs."""
        await ready
        last, connection.replied_at = monotonic(), monotonic()
        while True:
            connection.link.send(FrameKind.PING)
            await asyncio.sleep(PING_S)
            now = monotonic()
            if now - last > 2 * PING_S:  # this process was late itself
                connection.replied_at = now
            elif now - connection.replied_at > HUNG_S:
                log.error(
                    "front process %d has not replied for %g s: killing it", process.pid, HUNG_S
                )
                with suppress(ProcessLookupError):
                    process.kill()
                return
            last = now

    async def _run_front(
        self, listener: socket.socket, ready: asyncio.Future[None]
    ) -> tuple[int, int]:
        """Run a front until it exits. Returns its exit status and process id."""

        started = asyncio.get_running_loop().create_future()

        def is_ready() -> None:
            if not started.done():
                started.set_result(None)
            if not ready.done():
                ready.set_result(None)

        here, there = socket.socketpair()
        with there:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server.fronts"),
                *(str(there.fileno()), str(listener.fileno())),
                *(str(self._last_bytes_s), self._settings),
                stdin=DEVNULL,
                pass_fds=(there.fileno(), listener.fileno()),
            )
        connection = self._fronts[process] = FrontConnection(self._app, self._tasks, is_ready)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: connection.link, sock=here)
            watching = asyncio.create_task(self._watch(process, connection, started))
            try:
                return await process.wait(), process.pid
            finally:
                watching.cancel()
        finally:
            del self._fronts[process]
            connection.link.close()
