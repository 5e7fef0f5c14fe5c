"""Routes events from the engine's thread to the tasks that wait for them."""

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
    RowReleased,
    TextDelta,
)
from server.errors import LatentdError, ShuttingDown
from server.sessions.tiers import Tiers

MAX_SEPARATE_EVENTS = 1
"""Events per queue that stay separate; later text is merged. A fast reader gets an event per token;
slow readers and a lagging event loop catch up."""


PartialEvent = TextDelta | PromptScored
"""Events that do not end a request."""


@dataclass(frozen=True)
class Aborted:
    """The turn that waits for this queue has to end."""

    reason: LatentdError


class _MergedText:
    """Merged unread text of one request."""

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
    """Events of one answer, for a single reader.

    Slow readers get fewer and larger pieces: the queue holds at most `MAX_SEPARATE_EVENTS` events
    and a few per request.
    """

    def __init__(self) -> None:
        self._events: deque[Event | Aborted | _MergedText] = deque()
        self._merged: dict[str, _MergedText] = {}
        self._reader: asyncio.Future[None] | None = None
        self._timer: TimerHandle | None = None
        self._silent_at = math.inf
        """Deadline of the reader's wait, on the loop's clock."""

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event | Aborted) -> None:
        if isinstance(event, TextDelta) and len(self._events) >= MAX_SEPARATE_EVENTS:
            merged = self._merged.get(event.request_id)
            if merged is None:
                merged = self._merged[event.request_id] = _MergedText(event.request_id)
                self._events.append(merged)
            merged.add(event)
        else:
            self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def pop(self) -> list[PartialEvent] | Ending | Aborted:
        """All pending texts, or the next event that is not text.

        Raises IndexError if the queue is empty.
        """
        event = self._events.popleft()
        if not isinstance(event, TextDelta | _MergedText | PromptScored):
            return event
        texts = [self._text(event)]
        while self._events:
            event = self._events[0]
            if not isinstance(event, TextDelta | _MergedText | PromptScored):
                break
            self._events.popleft()
            texts.append(self._text(event))
        return texts

    async def wait(self, silence_s: float | None = None) -> bool:
        """Wait for an event. False after `silence_s` without one."""
        if self._events:
            return True
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        self._silent_at = math.inf if silence_s is None else loop.time() + silence_s
        if self._timer is None and silence_s is not None:
            # One timer for many waits: when it fires, it re-arms itself if the silence began later.
            self._timer = loop.call_at(self._silent_at, self._end_silence)
        await self._reader
        return bool(self._events)

    def close(self) -> None:
        """Stop the timer; the reader is done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _text(self, event: PartialEvent | _MergedText) -> PartialEvent:
        if isinstance(event, _MergedText):
            del self._merged[event.request_id]
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
    """Dispatches the engine's events to the queues of their turns. Belongs to the event loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._queues: dict[str, EventQueue] = {}

    def open(self, request_ids: Iterable[str]) -> EventQueue:
        """Open one queue for the events of these requests."""
        queue = EventQueue()
        self._queues.update(dict.fromkeys(request_ids, queue))
        return queue

    def close(self, request_ids: Iterable[str]) -> None:
        """Drop further events of these requests."""
        for request_id in request_ids:
            self._queues.pop(request_id, None)

    def dispatch(self, events: list[Event | RowReleased]) -> None:
        """Dispatch one step's events."""
        for event in events:
            if isinstance(event, RowReleased):
                self._tiers.row_released(event.state_id, is_evicted=event.is_evicted)
                continue
            queue = self._queues.get(event.request_id)
            if queue is not None:
                queue.put(event)
            if isinstance(event, Finished) and event.retained_as is not None:
                self._tiers.row_retained(event.retained_as)
                if queue is None:  # abandoned: nobody will continue it
                    self._tiers.release(event.retained_as)

    def abort(self) -> None:
        """End all running turns at shutdown."""
        reason = ShuttingDown("the server stopped before the answer was complete")
        for queue in self._queues.values():
            queue.put(Aborted(reason))
