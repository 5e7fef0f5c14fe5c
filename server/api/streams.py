"""Resumable streams: sent events are stored for a while, within bounds."""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from fastapi import Response
from fastapi.responses import StreamingResponse

from model.shares import has_space
from server.api.sse import EVENT_STREAM, KEEP_ALIVE_WITH_IDS, NO_BUFFERING
from server.errors import EventsGone, InvalidRequest, NotFound, Overloaded

StreamStatus = Literal["in_progress", "completed", "failed", "cancelled"]


class EventLog:
    """The last events of a stream, up to `max_bytes`, for any number of readers."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        self._num_bytes = 0
        self._first = 0
        self._ended = False
        self._grown = asyncio.Event()

    @property
    def num_events(self) -> int:
        """Events so far, including dropped ones."""
        return self._first + len(self._events)

    @property
    def first(self) -> int:
        """The number of the oldest stored event."""
        return self._first

    async def append(self, events: Sequence[bytes]) -> None:
        """Append events, dropping the oldest ones if necessary."""
        self._events.extend(events)
        self._num_bytes += sum(map(len, events))
        while self._num_bytes > self._max_bytes and len(self._events) > 1:
            self._num_bytes -= len(self._events.popleft())
            self._first += 1
        self._wake()

    def end(self) -> None:
        """Mark the end."""
        self._ended = True
        self._wake()

    async def follow(self, start: int, silence_s: float) -> AsyncIterator[bytes]:
        """Events from number `start` on, past and future; a comment after each silence.

        Ends early for a reader so slow that the events it needs next were dropped.
        """
        number = start
        while number >= self._first:
            if number < self.num_events:
                # Search from the end: readers that keep up are near it.
                waiting = list(islice(reversed(self._events), self.num_events - number))
                number += len(waiting)
                yield b"".join(reversed(waiting))
            elif self._ended:
                return
            elif not await self._grow(silence_s):
                yield KEEP_ALIVE_WITH_IDS

    async def _grow(self, silence_s: float) -> bool:
        """Wait for another event. False on timeout."""
        grown = self._grown
        try:
            async with asyncio.timeout(silence_s):
                await grown.wait()
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


class Stream:
    """A turn detached from its connection, and its events."""

    def __init__(
        self, stream_id: str, owner: str, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.id = stream_id
        self.owner = owner
        self._clock = clock
        self.created_at = clock()
        self.ended_at: float | None = None
        self.status: StreamStatus = "in_progress"
        self.log = EventLog(max_bytes)
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start the task that fills the log and calls `end`."""
        self._task = asyncio.create_task(work)

    def end(self, status: StreamStatus) -> None:
        """Mark the end of the stream."""
        self.status, self.ended_at = status, self._clock()
        self.log.end()

    async def cancel(self) -> None:
        """Cancel the turn, which rolls back; a finished one stays unchanged."""
        if self._task is not None and not self._task.done():
            await asyncio.sleep(0)  # a task cancelled before it starts would not close the turn
            self._task.cancel()
            await asyncio.wait([self._task])

    def number_after(self, event_id: str) -> int:
        """The number after this event id. Raises InvalidRequest."""
        given = event_id
        number = int(given) if given.isascii() and given.isdecimal() and len(given) < 16 else -1
        if not 0 <= number < self.log.num_events:
            raise InvalidRequest(
                f"{given[:40]!r} is not an event id of this stream: valid ids are 0 to "
                f"{self.log.num_events - 1}",
                "Last-Event-ID",
            )
        return number + 1

    def response(
        self, stream_keepalive_s: float, *, start: int = 0, headers: dict[str, str] | None = None
    ) -> Response:
        """A response with the events from number `start` on. Raises EventsGone if they were
        dropped.

        Status 204 if all were sent and the stream has ended, which stops an EventSource from
        reconnecting.
        """
        if start < self.log.first:
            raise EventsGone(self.id, self.log.first)
        if self.ended_at is not None and start >= self.log.num_events:
            return Response(status_code=204, headers=headers)
        return StreamingResponse(
            self.log.follow(start, stream_keepalive_s),
            media_type=EVENT_STREAM,
            headers=(headers or {}) | NO_BUFFERING,
        )


@dataclass(frozen=True)
class StreamLimits:
    """Limits of resumable streams."""

    max_streams: int
    max_bytes: int
    """Stored events per stream."""

    ttl_s: float
    """Seconds for which a finished stream can be read."""


class Streams:
    """All resumable streams of a server. Belongs to the event loop.

    Other owners get NotFound, as for a stream that does not exist or has expired.
    """

    def __init__(self, limits: StreamLimits, clock: Callable[[], float] = time.time) -> None:
        self._limits = limits
        self._clock = clock
        self._streams: OrderedDict[str, Stream] = OrderedDict()
        self._running = Counter[str]()

    @contextmanager
    def space(self, owner: str) -> Iterator[None]:
        """Reserve space for a stream while its turn runs. Raises Overloaded if the limit is reached
        and the owner has its share."""
        running, most = self._running, self._limits.max_streams
        num_owners = len(running.keys() | {owner})
        if not has_space(running[owner], running.total(), 1, most, num_owners):
            raise Overloaded(
                f"{running.total()} resumable streams are running already", "too_many_streams"
            )
        running[owner] += 1
        try:
            yield
        finally:
            running[owner] -= 1
            if not running[owner]:
                del running[owner]

    def add(self, owner: str, stream_id: str) -> Stream:
        """Add a stream within the reserved space. Drops the oldest ended streams of owners above
        their share."""
        self.forget_expired()
        stream = self._streams[stream_id] = Stream(
            stream_id, owner, self._limits.max_bytes, self._clock
        )
        while len(self._streams) > self._limits.max_streams:
            counts = Counter(each.owner for each in self._streams.values())
            share = self._limits.max_streams // len(counts)
            ended = [s for s in self._streams.values() if s.ended_at is not None]
            too_many = [s for s in ended if counts[s.owner] > share]
            if not too_many:
                break
            del self._streams[max(too_many, key=lambda each: counts[each.owner]).id]
        return stream

    def get(self, owner: str, stream_id: str) -> Stream:
        """Raises NotFound."""
        self.forget_expired()
        stream = self._streams.get(stream_id)
        if stream is None or stream.owner != owner:
            raise NotFound(
                f"there is no stream {stream_id[:80]}; streams are stored until "
                f"{self._limits.ttl_s:g} seconds after their end",
                "stream_id",
                "stream_not_found",
            )
        return stream

    async def delete(self, owner: str, stream_id: str) -> None:
        """Cancel and delete. Raises NotFound."""
        stream = self.get(owner, stream_id)
        await stream.cancel()
        self._streams.pop(stream_id, None)

    async def forget(self, owner: str) -> None:
        """Cancel and drop all streams of an owner."""
        for stream in [each for each in self._streams.values() if each.owner == owner]:
            await stream.cancel()
            self._streams.pop(stream.id, None)

    async def close(self) -> None:
        """Cancel all streams."""
        for stream in list(self._streams.values()):
            await stream.cancel()

    def expires_at(self, stream: Stream) -> float | None:
        """When the stream expires; None while it runs."""
        return None if stream.ended_at is None else stream.ended_at + self._limits.ttl_s

    def forget_expired(self) -> None:
        """Drop expired streams."""
        now = self._clock()
        for stream in list(self._streams.values()):
            expires_at = self.expires_at(stream)
            if expires_at is not None and expires_at <= now:
                del self._streams[stream.id]
