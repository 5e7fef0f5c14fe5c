"""Queues of events: order, who reads late, who reads slowly."""

import asyncio

import pytest

from server.api.router import MOST_APART, Aborted, EventQueue
from server.engine.messages import Event, Failed, TextDelta, Token


def delta(number: int, request_id: str = "a") -> TextDelta:
    return TextDelta(request_id, f"{number} ", (Token(number),))


def drain(queue: EventQueue) -> list[Event | Aborted]:
    return [queue.get_nowait() for _ in range(len(queue))]


def test_events_come_as_they_were_put() -> None:
    queue = EventQueue()
    events: list[Event | Aborted] = [delta(1), delta(2, "b"), Failed("a", "no"), Aborted()]
    for event in events:
        queue.put(event)
    assert drain(queue) == events
    with pytest.raises(IndexError):
        queue.get_nowait()


def test_what_nobody_reads_is_put_together() -> None:
    queue = EventQueue()
    for number in range(5000):
        queue.put(delta(number, "ab"[number % 2]))
    queue.put(Failed("a", "no"))
    assert len(queue) == MOST_APART + 3
    events = drain(queue)
    assert events[-1] == Failed("a", "no")
    for first, request_id in enumerate("ab"):
        own = [e for e in events if isinstance(e, TextDelta) and e.request_id == request_id]
        numbers = range(first, 5000, 2)
        assert "".join(event.text for event in own) == "".join(f"{n} " for n in numbers)
        assert [t.token_id for event in own for t in event.tokens] == list(numbers)
        assert sum(event.num_generated for event in own) == len(numbers)


def test_after_a_pause_events_come_apart_again() -> None:
    queue = EventQueue()
    for number in range(100):
        queue.put(delta(number))
    assert len(drain(queue)) == MOST_APART + 1
    queue.put(delta(1))
    queue.put(delta(2))
    assert drain(queue) == [delta(1), delta(2)]


def test_a_reader_waits_for_the_next_event() -> None:
    async def main() -> None:
        queue = EventQueue()
        reader = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert not reader.done()
        queue.put(delta(1))
        queue.put(delta(2))
        assert await reader == delta(1)
        assert await queue.get() == delta(2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get(), 0.01)
        queue.put(delta(3))
        assert await queue.get() == delta(3)

    asyncio.run(main())
