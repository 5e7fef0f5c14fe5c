"""`latentd serve`: build everything, say what was built, run until a signal comes."""

import asyncio
import gc
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType

import uvicorn

from model.checkpoint import Checkpoint
from server.api.app import create_app, drain
from server.api.conversation import TemplateFault
from server.connections import uvicorn_config
from server.engine.device import choose_device, choose_dtype, choose_threads, load
from server.fronts.carrier import App
from server.fronts.keeper import FrontFailed, Keeper
from server.keys import KeyFileError, read_keys
from server.sessions.sqlite.store import SQLiteStore
from server.settings import Settings

STORE_FILE = "sessions.sqlite3"
LAST_BYTES_S = 10
"""Time for answers that are complete to reach their clients."""


class ServeError(Exception):
    """The server cannot start; one line says why."""


def serve(settings: Settings, started: float) -> None:
    """Run a server until SIGTERM or SIGINT. `started` is when the start began (monotonic).

    Raises ServeError, CheckpointError, DeviceError, StoreError and KeyFileError before it
    has started.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if settings.key_file is not None:
        read_keys(settings.key_file)  # what is wrong with it is told before the slow part
    with ExitStack() as stack:
        listeners = [stack.enter_context(_bind(settings.host, settings.port))]
        if settings.api_workers > 1:
            listeners = _share(listeners[0], settings.api_workers, stack)
        _serve_on(listeners, settings, started)


def _serve_on(listeners: Sequence[socket.socket], settings: Settings, started: float) -> None:
    device, device_reason = choose_device(settings.device)
    report = partial(print, flush=True)
    report(f"loading    {settings.checkpoint}")
    loaded = load(settings.checkpoint, device, choose_dtype(settings.dtype, device), report)
    device_reason += f", {choose_threads(settings.threads, loaded.network)}"
    store = SQLiteStore(settings.data_dir / STORE_FILE, settings.durability)
    report(_facts(settings, loaded, device_reason))
    try:
        app = create_app(settings, loaded, store)
    except TemplateFault as error:
        asyncio.run(store.close())
        raise ServeError(f"{settings.checkpoint}: chat template: {error}") from error
    except KeyFileError:
        asyncio.run(store.close())
        raise
    config = uvicorn_config(app, settings, LAST_BYTES_S)
    try:
        if settings.api_workers == 1:
            _Server(config, partial(drain, app), started).run(list(listeners))
        else:
            fronted = _FrontedServer(config, partial(drain, app), started, app, settings)
            fronted.run(list(listeners))
    except FrontFailed as error:
        raise ServeError(str(error)) from error


class _Server(uvicorn.Server):
    """Says when it listens; a signal begins the drain, a second one ends the process at once.

    While it drains it still answers, so that clients are told why no turn is taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Coroutine[None, None, None]],
        started: float,
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._started = started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await self._listen(sockets or [])
        # A full collection would go through all modules, 150 ms in which nothing else runs.
        gc.collect()
        gc.freeze()
        for listener in (sockets or [])[:1]:
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            ready_s = time.monotonic() - self._started
            print(f"listening  http://{shown}:{port}  (ready in {ready_s:.1f} s)", flush=True)

    async def _listen(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        self._num_signals += 1
        if self._num_signals > 1:  # what is acknowledged is in the store, which needs no closing
            os._exit(128 + sig)
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


class _FrontedServer(_Server):
    """One whose connections are those of front processes, a process for each socket."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Coroutine[None, None, None]],
        started: float,
        app: App,
        settings: Settings,
    ) -> None:
        super().__init__(config, drain, started)
        self._app = app
        self._settings = settings
        self._keeper: Keeper | None = None

    async def _listen(self, sockets: list[socket.socket]) -> None:
        await super()._listen([])
        tasks = self.server_state.tasks
        self._keeper = Keeper(self._app, self._settings, sockets, LAST_BYTES_S, tasks)
        try:
            await self._keeper.start()
        except FrontFailed:
            await self.shutdown()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._keeper is not None:
            await self._keeper.stop()
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, before the slow part of the start."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.set_inheritable(True)
    return listener


def _share(first: socket.socket, count: int, stack: ExitStack) -> list[socket.socket]:
    """So many sockets in the place of `first`, among which the kernel spreads connections.

    `first` was bound without sharing, so that another server on the address was noticed.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ServeError(f"--api-workers {count}: processes cannot share a port on this system")
    family, address = first.family, first.getsockname()
    first.close()
    listeners = []
    for _ in range(count):
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError as error:
            raise ServeError(f"cannot share {address[0]}:{address[1]}: {error.strerror}") from error
        listeners.append(listener)
    return listeners


def _facts(settings: Settings, loaded: Checkpoint, device: str) -> str:
    network = loaded.network
    state_bytes = network.state_spec.num_bytes
    rows = settings.max_running + settings.warm_sessions
    turns = settings.keep_turns
    free = shutil.disk_usage(settings.data_dir).free
    return "\n".join(
        [
            f"model      {settings.served_name}: {network.num_parameters:,} parameters, "
            f"{settings.checkpoint}",
            f"device     {device}",
            f"backend    {network.backend}",
            f"arithmetic {network.arithmetic}",
            f"session    {state_bytes:,} bytes, at any length",
            f"fits       {rows:,} on the device, {settings.host_cache_bytes // state_bytes:,} in "
            f"host memory, about {free // (state_bytes * turns):,} on disk with {turns} turns each",
            f"store      {settings.data_dir / STORE_FILE}",
        ]
    )
