"""From the engine's thread to the tasks that wait: every request's events go into its queue."""

import asyncio
import math
from asyncio import TimerHandle
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.messages import (
    Ending,
    Event,
    Finished,
    PromptScored,
    RowGivenUp,
    TextDelta,
)
from server.errors import LatentdError, ShuttingDown
from server.sessions.tiers import Tiers

MOST_APART = 1
"""Events of a queue that stay as they are; text beyond them is put together: whoever keeps up gets
an event a token, and a reader or an event loop that is late catches up."""


Text = TextDelta | PromptScored
"""What is told and ends nothing."""


@dataclass(frozen=True)
class Aborted:
    """The turn that waits for this queue has to end."""

    reason: LatentdError


class _Heap:
    """Text of one request that nobody has read yet, in one piece."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._parts: list[TextDelta] = []

    def add(self, event: TextDelta) -> None:
        self._parts.append(event)

    def event(self) -> TextDelta:
        if len(self._parts) == 1:
            return self._parts[0]
        parts = tuple(self._parts)
        return TextDelta(
            self.request_id,
            "".join(part.text for part in parts),
            tuple(token for part in parts for token in part.tokens),
            sum(part.num_generated for part in parts),
            parts,
        )


class EventQueue:
    """Events of one answer, for the one task that reads them.

    Who reads slowly gets fewer and larger pieces: the queue has no more events than `MOST_APART`
    and a few for each request.
    """

    def __init__(self) -> None:
        self._events: deque[Event | Aborted | _Heap] = deque()
        self._heaps: dict[str, _Heap] = {}
        self._reader: asyncio.Future[None] | None = None
        self._timer: TimerHandle | None = None
        self._silent_at = math.inf
        """When the reader has waited for too long, on the loop's clock."""

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event | Aborted) -> None:
        """Add an event."""
        if isinstance(event, TextDelta) and len(self._events) >= MOST_APART:
            heap = self._heaps.get(event.request_id)
            if heap is None:
                heap = self._heaps[event.request_id] = _Heap(event.request_id)
                self._events.append(heap)
            heap.add(event)
        else:
            self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def take(self) -> list[Text] | Ending | Aborted:
        """The texts that are next, all that there are; or the one event that is no text.

        Raises IndexError if there is nothing.
        """
        event = self._events.popleft()
        if not isinstance(event, TextDelta | _Heap | PromptScored):
            return event
        texts = [self._text(event)]
        while self._events:
            event = self._events[0]
            if not isinstance(event, TextDelta | _Heap | PromptScored):
                break
            self._events.popleft()
            texts.append(self._text(event))
        return texts

    async def wait(self, silence_s: float | None = None) -> bool:
        """Until there is an event. False when none has come for so long."""
        if self._events:
            return True
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        self._silent_at = math.inf if silence_s is None else loop.time() + silence_s
        if self._timer is None and silence_s is not None:
            # One timer for many waits: it looks when it fires whether the silence began later.
            self._timer = loop.call_at(self._silent_at, self._end_silence)
        await self._reader
        return bool(self._events)

    def close(self) -> None:
        """Nobody will wait any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _text(self, event: Text | _Heap) -> Text:
        if isinstance(event, _Heap):
            del self._heaps[event.request_id]
            return event.event()
        return event

    def _end_silence(self) -> None:
        self._timer = None
        if self._reader is None or self._reader.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._silent_at:
            self._reader.set_result(None)
        elif self._silent_at < math.inf:
            self._timer = loop.call_at(self._silent_at, self._end_silence)


class Router:
    """Hands the engine's events to the turns that wait for them. Belongs to the event loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._queues: dict[str, EventQueue] = {}

    def open(self, request_ids: Iterable[str]) -> EventQueue:
        """One queue for the events of all these requests."""
        queue = EventQueue()
        self._queues.update(dict.fromkeys(request_ids, queue))
        return queue

    def close(self, request_ids: Iterable[str]) -> None:
        """Deliver no more events of these requests."""
        for request_id in request_ids:
            self._queues.pop(request_id, None)

    def dispatch(self, events: list[Event | RowGivenUp]) -> None:
        """Hand out one step's events."""
        for event in events:
            if isinstance(event, RowGivenUp):
                self._tiers.row_given_up(event.state_id, is_evicted=event.is_evicted)
                continue
            queue = self._queues.get(event.request_id)
            if queue is not None:
                queue.put(event)
            if isinstance(event, Finished) and event.kept_as is not None:
                self._tiers.row_kept(event.kept_as)
                if queue is None:  # nobody will continue from there
                    self._tiers.release(event.kept_as)

    def abort(self) -> None:
        """End every turn that runs, since the server stops."""
        reason = ShuttingDown("the server stopped before the answer was complete")
        for queue in self._queues.values():
            queue.put(Aborted(reason))
