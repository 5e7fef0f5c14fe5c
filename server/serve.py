"""`latentd serve`: build everything, say what was built, run until a signal comes."""

import asyncio
import logging
import shutil
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from model import checkpoint
from model.checkpoint import Checkpoint
from server.api.app import create_app, drain
from server.engine.device import choose_device, choose_threads
from server.sessions.sqlite import SQLiteStore
from server.settings import Settings

STORE_FILE = "sessions.sqlite3"


class ServeError(Exception):
    """The server cannot start; one line says why."""


def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT.

    Raises ServeError, CheckpointError, DeviceError and StoreError before it has started.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listener = _bind(settings.host, settings.port)
    device, device_reason = choose_device(settings.device)
    print(f"loading    {settings.checkpoint}; a first start also compiles code", flush=True)
    loaded = checkpoint.load(settings.checkpoint, device, settings.dtype)
    device_reason += f", {choose_threads(settings.threads, loaded.network)}"
    store = SQLiteStore(settings.data_dir / STORE_FILE)
    print(_facts(settings, loaded, device_reason), flush=True)
    app = create_app(settings, loaded, store)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_timeout_s) + 10,
    )
    _Server(config, partial(drain, app)).run([listener])


class _Server(uvicorn.Server):
    """Says when it listens; a signal begins the drain, a second one ends the process."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"listening  http://{shown}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)


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


def _facts(settings: Settings, loaded: Checkpoint, device: str) -> str:
    network = loaded.network
    state_bytes = network.state_spec.num_bytes
    rows = settings.max_running + settings.warm_sessions
    free = shutil.disk_usage(settings.data_dir).free
    return "\n".join(
        [
            f"model      {settings.served_name}: {network.num_parameters:,} parameters, "
            f"{settings.checkpoint}",
            f"device     {device}",
            f"session    {state_bytes:,} bytes, at any length",
            f"fits       {rows:,} on the device, {settings.host_cache_bytes // state_bytes:,} in "
            f"host memory, about {free // state_bytes:,} on disk",
            f"store      {settings.data_dir / STORE_FILE}",
        ]
    )
