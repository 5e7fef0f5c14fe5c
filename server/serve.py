"""`latentd serve`: build the server, report its configuration, run until a signal."""

import asyncio
import gc
import ipaddress
import logging
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from model.checkpoint import Checkpoint, CheckpointError
from server import __version__, logs
from server.api.app import create_app, drain, erase_owner
from server.api.conversation import InvalidTemplate
from server.connections import uvicorn_config
from server.engine.device import choose_device, choose_threads, load
from server.engine.sizes import SizeError, Sizes
from server.fronts.front_connection import App
from server.fronts.supervisor import FrontError, Supervisor
from server.keys import KeyFileError, read_keys
from server.listeners import ListenError, bind, check_certificate, metrics_server, url_of
from server.sessions.models import SHORT
from server.sessions.sqlite.snapshots import serve_snapshots
from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.settings import Settings

if TYPE_CHECKING:
    from server.telemetry import Telemetry

log = logging.getLogger(__name__)
LAST_BYTES_S = 10
"""Time limit for complete responses to reach their clients."""


class ServeError(Exception):
    """The server cannot start; the message is one line."""


def serve(settings: Settings, started: float) -> None:
    """Run a server until SIGTERM or SIGINT. `started`: when startup began (monotonic).

    Raises ServeError, ListenError, CheckpointError, DeviceError, StoreError and KeyFileError before
    it has started.
    """
    logs.configure(settings.log_level, settings.log_format)
    # Report errors in these before the slow part.
    if settings.key_file is not None:
        read_keys(settings.key_file)
    check_certificate(settings)
    telemetry = _telemetry(settings)
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    with ExitStack() as stack:
        listeners = bind(settings, stack)
        if not settings.has_keys and settings.unix_socket is None:
            _warn_if_open(listeners[0].getsockname()[0])
        drain_s = _serve_on(listeners, settings, started, telemetry)
    if telemetry is not None:
        telemetry.close()
    seconds = {"drain_s": round(drain_s, 3), "uptime_s": round(time.monotonic() - started, 3)}
    log.info("exit", extra={"fields": seconds})


def _serve_on(
    listeners: Sequence[socket.socket],
    settings: Settings,
    started: float,
    telemetry: "Telemetry | None",
) -> float:
    """Returns the seconds of the drain."""
    device, device_reason = choose_device(settings.device)
    report = partial(print, flush=True)
    report(f"loading    {settings.checkpoint}")
    loaded = load(settings.checkpoint, device, settings.dtype, report)
    device_reason += f", {choose_threads(settings.threads, loaded.network)}"
    store = SQLiteStore(settings.data_dir / STORE_FILE, settings.durability)
    start: dict[str, object] = {"version": __version__, "pid": os.getpid()}
    start |= {"model": settings.served_name, "checkpoint": str(settings.checkpoint)}
    start["load_s"] = round(time.monotonic() - started, 3)
    log.info("start", extra={"fields": start})
    trace = None if telemetry is None else telemetry.record
    with ExitStack() as stack:
        try:
            app = create_app(settings, loaded, store, trace)
            report(_facts(settings, loaded, device_reason, app.state.sizes))
            if url := stack.enter_context(metrics_server(settings, app.state.metrics)):
                report(f"metrics    {url}")
        except InvalidTemplate as error:
            asyncio.run(store.close())
            raise ServeError(f"{settings.checkpoint}: chat template: {error}") from error
        except SizeError as error:
            asyncio.run(store.close())
            raise ServeError(str(error)) from error
        except (CheckpointError, KeyFileError, ListenError):
            asyncio.run(store.close())
            raise
        config = uvicorn_config(app, settings, LAST_BYTES_S)
        if settings.api_workers == 1:
            server = _Server(config, partial(drain, app), started, settings)
        else:
            server = _FrontedServer(config, partial(drain, app), started, settings, app)
        try:
            with serve_snapshots(store, settings.data_dir, partial(erase_owner, app)):
                server.run(list(listeners))
        except FrontError as error:
            raise ServeError(str(error)) from error
        return server.drain_s


class _Server(uvicorn.Server):
    """Reports when it listens. The first signal starts the drain, a second one exits at once.

    While draining it still responds, so that clients learn why new turns are rejected.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Coroutine[None, None, None]],
        started: float,
        settings: Settings,
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._started = started
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._num_signals = 0
        self.drain_s = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await self._listen(sockets or [])
        # A full collection traverses all modules, which blocks everything for 150 ms.
        gc.collect()
        gc.freeze()
        for listener in (sockets or [])[:1]:
            url, ready_s = url_of(listener, self._settings), time.monotonic() - self._started
            log.info("ready", extra={"fields": {"url": url, "ready_s": round(ready_s, 3)}})
            print(f"listening  {url}  (ready in {ready_s:.1f} s)", flush=True)

    async def _listen(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        self._num_signals += 1
        if self._num_signals > 1:  # acknowledged turns are in the store, which needs no closing
            os._exit(128 + sig)
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        began = time.monotonic()
        try:
            await self._drain()
        finally:
            self.drain_s = time.monotonic() - began
            self.should_exit = True


class _FrontedServer(_Server):
    """A server whose connections are handled by front processes, one per socket."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Coroutine[None, None, None]],
        started: float,
        settings: Settings,
        app: App,
    ) -> None:
        super().__init__(config, drain, started, settings)
        self._app = app
        self._supervisor: Supervisor | None = None

    async def _listen(self, sockets: list[socket.socket]) -> None:
        await super()._listen([])
        tasks = self.server_state.tasks
        self._supervisor = Supervisor(self._app, self._settings, sockets, LAST_BYTES_S, tasks)
        try:
            await self._supervisor.start()
        except FrontError:
            await self.shutdown()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._supervisor is not None:
            await self._supervisor.stop()
        await super().shutdown(sockets)


def _telemetry(settings: Settings) -> "Telemetry | None":
    if not settings.otel:
        return None
    try:
        from server.telemetry import Telemetry
    except ImportError as error:
        raise ServeError(f"--otel needs latentd[otel], which is not installed: {error}") from error
    return Telemetry(__version__, settings.served_name)


def _warn_if_open(address: str) -> None:
    """Warn if a server without keys is reachable from other machines."""
    if not ipaddress.ip_address(address).is_loopback:
        log.warning(
            "without keys, anyone who can reach %s has full access: set LATENTD_API_KEY or "
            "--key-file, or listen on --host 127.0.0.1",
            address,
        )


def _facts(settings: Settings, loaded: Checkpoint, device: str, sizes: Sizes) -> str:
    network = loaded.network
    state_bytes = network.state_spec.num_bytes
    rows = sizes.max_running + sizes.warm_sessions
    turns = sizes.keep_turns
    free = shutil.disk_usage(settings.data_dir).free
    return "\n".join(
        [
            f"model      {settings.served_name}: {network.num_parameters:,} parameters, "
            f"{settings.checkpoint}, fingerprint {loaded.fingerprint[:SHORT]}",
            f"device     {device}",
            f"backend    {network.backend}",
            f"arithmetic {network.arithmetic}",
            f"session    {state_bytes:,} bytes, at any length",
            f"fits       {rows:,} on the device, {sizes.host_cache_bytes // state_bytes:,} in "
            f"host memory, about {free // (state_bytes * turns):,} on disk with {turns} turns each",
            f"states     {sizes.max_running:,} running, {sizes.warm_sessions:,} warm, "
            f"{sizes.prefix_cache_bytes // state_bytes:,} in the prefix cache, "
            f"{sizes.waiting_bytes // state_bytes:,} waiting",
            f"store      {settings.data_dir / STORE_FILE}",
        ]
    )
