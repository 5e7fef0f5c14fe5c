"""From the engine's thread to the tasks that wait: every request's events go into its queue."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.engine import Engine
from server.engine.messages import Event, Evicted, Finished


@dataclass(frozen=True)
class Aborted:
    """The server stops: the turn that waits for this queue has to end."""


class Router:
    """Belongs to the event loop. Rows kept for nobody are given back to the engine."""

    def __init__(self, engine: Engine, row_evicted: Callable[[str], None]) -> None:
        self._engine = engine
        self._row_evicted = row_evicted
        self._queues: dict[str, asyncio.Queue[Event | Aborted]] = {}

    def open(self, request_ids: Iterable[str]) -> asyncio.Queue[Event | Aborted]:
        """One queue for the events of all these requests."""
        queue: asyncio.Queue[Event | Aborted] = asyncio.Queue()
        self._queues.update(dict.fromkeys(request_ids, queue))
        return queue

    def close(self, request_ids: Iterable[str]) -> None:
        """Deliver no more events of these requests; drop those that nobody has taken."""
        for request_id in request_ids:
            queue = self._queues.pop(request_id, None)
            while queue is not None and queue not in self._queues.values() and not queue.empty():
                self._drop(queue.get_nowait())

    def dispatch(self, events: list[Event | Evicted]) -> None:
        """Hand out one step's events."""
        for event in events:
            if isinstance(event, Evicted):
                self._row_evicted(event.name)
            elif (queue := self._queues.get(event.request_id)) is not None:
                queue.put_nowait(event)
            else:
                self._drop(event)

    def abort(self) -> None:
        """End every turn that runs."""
        for queue in self._queues.values():
            queue.put_nowait(Aborted())

    def _drop(self, event: Event | Aborted) -> None:
        if isinstance(event, Finished) and event.warm is not None:
            self._engine.release(event.warm)
