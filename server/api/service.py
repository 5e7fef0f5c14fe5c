"""What every route works with; built once in the app's lifespan."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from model.checkpoint import Checkpoint
from server.api.router import Router
from server.engine.engine import Engine
from server.errors import ShuttingDown
from server.metrics import Metrics
from server.sessions.sessions import Sessions
from server.settings import Settings


@dataclass(frozen=True)
class Service:
    """The running parts of one server."""

    settings: Settings
    checkpoint: Checkpoint
    model_name: str
    created: int
    """Unix seconds when the checkpoint was written."""

    metrics: Metrics
    sessions: Sessions
    engine: Engine
    router: Router
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server is about to stop: no new turns."""

    @property
    def is_ready(self) -> bool:
        return self.engine.is_running and not self.draining.is_set()

    def check_ready(self) -> None:
        """Raises ShuttingDown when no new turn may begin."""
        if not self.is_ready:
            raise ShuttingDown("the server is not taking requests")

    def drain(self) -> None:
        """Take no new turns; those that still run when the drain timeout is over roll back."""
        if not self.draining.is_set():
            self.draining.set()
            loop = asyncio.get_running_loop()
            loop.call_later(self.settings.drain_timeout_s, self.router.abort)


def get_service(request: Request) -> Service:
    """The service of the app that got the request."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise ShuttingDown("the server is not running")
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
