"""Detached turns: they run without a connection, and their events are logged for later readers."""

import asyncio
from typing import Any

from server.api.generation.answer import Answer
from server.api.generation.deliver import deliver_events
from server.api.generation.shape import Shape
from server.api.generation.turn import AdmittedTurn
from server.api.service import Service
from server.api.sse import EventSink
from server.api.streams import Stream, StreamStatus
from server.errors import Cancelled


def start_stream(
    service: Service, owner: str, turn: AdmittedTurn, answer: Answer, shape: Shape[Any]
) -> Stream:
    """Run the turn in the background and log its events."""
    stream = service.streams.add(owner, answer.id)
    stream.start(_run(stream, turn, answer, shape))
    return stream


async def _run(stream: Stream, turn: AdmittedTurn, answer: Answer, shape: Shape[Any]) -> None:
    sink = EventSink(stream.log.append, shape.format, None, has_ids=True)
    status: StreamStatus = "failed"
    delivering = asyncio.ensure_future(deliver_events(turn, answer, shape, sink))
    try:
        while not delivering.done():
            try:
                await asyncio.wait([delivering])
            except asyncio.CancelledError:
                if not turn.is_committed:  # else it comes too late: readers see the end
                    delivering.cancel()
        if delivering.result() == "ok":
            status = "completed"
    except asyncio.CancelledError:
        status = "cancelled"
        await sink.send(sink.encode([shape.failure(Cancelled())]))
        await sink.done()
    finally:
        stream.end(status)
