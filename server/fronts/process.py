"""A front process: serves clients on one socket, talks to the core on another."""

import asyncio
import json
import os
import socket
from types import FrameType

import uvicorn

from server import logs
from server.connections import uvicorn_config
from server.fronts.frames import FrameKind
from server.fronts.gateway import Gateway
from server.fronts.link import Link
from server.settings import Settings

LOST_CORE = 1
"""Exit status of a front that lost its core."""


def run(link_fd: str, listener_fd: str, last_bytes_s: str, settings_json: str) -> None:
    """Serve until the core sends STOP or exits. The file descriptors are inherited."""
    settings = Settings(**json.loads(settings_json))
    logs.configure(settings.log_level, settings.log_format)
    with socket.socket(fileno=int(link_fd)) as link, socket.socket(fileno=int(listener_fd)) as own:
        _Server(settings, link, int(last_bytes_s)).run([own])


class _Server(uvicorn.Server):
    """Ignores signals: the core stops its fronts."""

    def __init__(self, settings: Settings, link: socket.socket, last_bytes_s: int) -> None:
        self._gateway = Gateway(self._stop)
        config = uvicorn_config(self._gateway, settings, last_bytes_s)
        config.lifespan = "off"
        super().__init__(config)
        self._link = link

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        _, self._gateway.link = await loop.create_unix_connection(
            lambda: Link(self._gateway.handle, self._lost), sock=self._link
        )
        await super().startup(sockets)
        self._gateway.link.send(FrameKind.READY)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame

    def _stop(self) -> None:
        self.should_exit = True

    def _lost(self) -> None:
        os._exit(LOST_CORE)  # no request in progress can be completed
