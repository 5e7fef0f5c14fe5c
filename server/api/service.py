"""The service behind all routes, built once in the app's lifespan."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Request

from model.checkpoint import Checkpoint
from model.decoding.grammar import GrammarCompiler
from server.api.conversation import Conversation
from server.api.generation.router import Router
from server.api.limits import Limiter
from server.api.streams import Streams
from server.api.texts import Texts
from server.engine.engine import Engine
from server.engine.messages import StoredState
from server.errors import Cancelled, LatentdError, ShuttingDown
from server.metrics import Metrics
from server.sessions.ledger import Ledger
from server.sessions.models import describe_counts
from server.sessions.store import EntryKind
from server.settings import Settings

ROLLBACK_S = 5.0
"""Time for aborted turns to roll back."""

log = logging.getLogger(__name__)


class OpenTurn(Protocol):
    """What the service knows of a turn."""

    owner: str

    def end(self, reason: LatentdError) -> None:
        """Roll the turn back, unless it has ended."""


class OpenTurns:
    """The set of open turns."""

    def __init__(self) -> None:
        self._turns = set[OpenTurn]()
        self._changed = asyncio.Event()

    def add(self, turn: OpenTurn) -> None:
        self._turns.add(turn)

    def discard(self, turn: OpenTurn) -> None:
        self._turns.discard(turn)
        self._changed.set()

    def __len__(self) -> int:
        return len(self._turns)

    def of(self, owner: str) -> list[OpenTurn]:
        """An owner's turns."""
        return [turn for turn in self._turns if turn.owner == owner]

    async def closed(self, timeout_s: float, owner: str | None = None) -> bool:
        """Wait until no turn, or none of the owner's, is open. False on timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._turns if owner is None else self.of(owner):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True)
class Service:
    """The components of one server."""

    settings: Settings
    checkpoint: Checkpoint
    model_name: str
    created: int
    """Unix seconds when the checkpoint was written."""

    metrics: Metrics
    ledger: Ledger
    engine: Engine
    router: Router
    streams: Streams
    grammars: GrammarCompiler
    conversation: Conversation | None
    """The chat template; None for a model without one."""

    limiter: Limiter
    initial_states: Mapping[str, StoredState] = field(default_factory=dict)
    """Named initial states."""

    texts: Texts = field(default_factory=Texts)
    open_turns: OpenTurns = field(default_factory=OpenTurns)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set on shutdown: no new turns."""

    @property
    def is_ready(self) -> bool:
        return self.engine.is_running and not self.draining.is_set()

    def check_ready(self) -> None:
        """Raises ShuttingDown if no new turn may start."""
        if not self.is_ready:
            raise ShuttingDown("the server is not accepting requests")

    def end_turns(self, owner: str, reason: LatentdError) -> None:
        """Roll back all running turns of an owner, also those in the background."""
        for turn in self.open_turns.of(owner):
            turn.end(reason)

    async def erase(self, owner: str) -> Counter[EntryKind]:
        """End an owner's turns and erase all its data, in memory and on disk. Returns the numbers
        of sessions and responses. Raises StorageFailed."""
        self.end_turns(owner, Cancelled())
        await self.streams.forget(owner)
        await self.open_turns.closed(ROLLBACK_S, owner)
        erased = await self.ledger.erase_all(owner)
        self.engine.forget(owner)
        self.grammars.forget(owner)
        log.info("erased", extra={"fields": {"key": owner, "erased": describe_counts(erased)}})
        return erased

    async def drain(self) -> None:
        """Accept no new turns; abort those that still run after the drain timeout."""
        self.draining.set()
        timeout_s, num_turns = self.settings.drain_timeout_s, len(self.open_turns)
        log.info("drain", extra={"fields": {"turns": num_turns, "timeout_s": timeout_s}})
        if not await self.open_turns.closed(timeout_s):
            self.router.abort()
            await self.open_turns.closed(ROLLBACK_S)


async def get_service(request: Request) -> Service:
    """FastAPI dependency: the app's service."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise ShuttingDown("the server is not running")
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
