"""From the engine's thread to the tasks that wait: every request's events go into its queue."""

import asyncio
from collections.abc import Iterable

from server.engine.engine import Engine
from server.engine.messages import Event, Finished


class Router:
    """Belongs to the event loop. Rows kept for nobody are given back to the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[str, asyncio.Queue[Event]] = {}

    def open(self, request_ids: Iterable[str]) -> asyncio.Queue[Event]:
        """One queue for the events of all these requests."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues.update(dict.fromkeys(request_ids, queue))
        return queue

    def close(self, request_ids: Iterable[str]) -> None:
        """Deliver no more events of these requests; drop those that nobody has taken."""
        queues = [self._queues.pop(request_id, None) for request_id in request_ids]
        for queue in queues:
            while queue is not None and not queue.empty():
                self._drop(queue.get_nowait())

    def dispatch(self, events: list[Event]) -> None:
        """Hand out one step's events."""
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is None:
                self._drop(event)
            else:
                queue.put_nowait(event)

    def _drop(self, event: Event) -> None:
        if isinstance(event, Finished) and event.warm is not None:
            self._engine.release(event.warm)
