"""A real server on a free port of the loopback, in a thread of the test process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import uvicorn
from fastapi import FastAPI

from model import checkpoint
from server.api.app import create_app
from server.api.middleware import Trace
from server.api.service import Service
from server.connections import uvicorn_config
from server.sessions.sqlite.store import SQLiteStore
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until
from tests.server.documented import Documented


@dataclass(frozen=True)
class LiveServer:
    url: str
    app: FastAPI
    service: Service

    documented: Documented

    def client(self) -> httpx.Client:
        """A client that checks all responses against the documentation."""
        hooks = {"response": [self.documented.check]}
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, event_hooks=hooks)

    def wait_until_idle(self) -> None:
        """Wait until nothing runs or waits in the engine."""
        self.wait_until_running(0)

    def wait_until_running(self, count: int) -> None:
        """Wait until this many sequences run in the engine, and none waits."""
        running = self.service.metrics.slots.labels(state="running")._value
        wait_until(lambda: running.get() == count and self.num_waiting() == 0)

    def num_waiting(self) -> float:
        """Sequences that wait for a row."""
        return float(self.service.metrics.requests_waiting._value.get())

    def num_answered(self, outcome: str) -> float:
        """Completions with this outcome."""
        answered = self.service.metrics.requests_total
        return float(answered.labels(endpoint="/v1/completions", outcome=outcome)._value.get())


@contextmanager
def live_server(
    settings: Settings, send_buffer_bytes: int | None = None, trace: Trace | None = None
) -> Iterator[LiveServer]:
    """Run a server with these settings until the context ends.

    `send_buffer_bytes`: socket buffer for a client that does not read; by default some megabytes.
    """
    loaded = checkpoint.load(settings.checkpoint, torch.device("cpu"))
    store = SQLiteStore(settings.data_dir / "sessions.sqlite3", settings.durability)
    app = create_app(settings, loaded, store, trace)
    server = uvicorn.Server(uvicorn_config(app, settings, 5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer_bytes is not None:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield LiveServer(url, app, app.state.service, Documented(app.openapi()))
        finally:
            server.should_exit = True
            thread.join()


def tiny_settings(folder: Path, data_dir: Path, **changes: object) -> Settings:
    """Settings for the tiny checkpoint, independent of the environment, without waiting for busy
    sessions."""
    usual = {"checkpoint": folder, "data_dir": data_dir, "session_wait_s": 0}
    return Settings.model_validate(usual | changes)
