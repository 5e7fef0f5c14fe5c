"""Event queues: order, late readers, slow readers."""

import asyncio

import pytest

from server.api.generation.router import MAX_SEPARATE_EVENTS, Aborted, EventQueue
from server.engine.messages import Event, Failed, PromptScored, TextDelta, Token
from server.errors import ShuttingDown


def delta(number: int, request_id: str = "a") -> TextDelta:
    return TextDelta(request_id, f"{number} ", (Token(number),))


STOPPED = Aborted(ShuttingDown())


def drain(queue: EventQueue) -> list[Event | Aborted]:
    collected = list[Event | Aborted]()
    while len(queue):
        events = queue.pop()
        collected += events if isinstance(events, list) else [events]
    return collected


def test_events_come_as_they_were_put() -> None:
    queue = EventQueue()
    events: list[Event | Aborted] = [delta(1), delta(2, "b"), Failed("a", "no"), STOPPED]
    for event in events:
        queue.put(event)
    assert drain(queue) == events
    with pytest.raises(IndexError):
        queue.pop()


def test_unread_texts_are_merged() -> None:
    queue = EventQueue()
    for number in range(5000):
        queue.put(delta(number, "ab"[number % 2]))
    queue.put(Failed("a", "no"))
    assert len(queue) == MAX_SEPARATE_EVENTS + 3
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
    assert len(drain(queue)) == MAX_SEPARATE_EVENTS + 1
    queue.put(delta(1))
    assert queue.pop() == [delta(1)]
    queue.put(delta(2))
    assert queue.pop() == [delta(2)]


def test_texts_are_merged_and_other_events_are_not() -> None:
    queue = EventQueue()
    scored, failed = PromptScored("a", (Token(0),)), Failed("a", "no")
    for event in (scored, delta(1), delta(2, "b"), delta(3), failed, delta(4, "c"), STOPPED):
        queue.put(event)
    both = TextDelta("a", "1 3 ", (Token(1), Token(3)), 2, (delta(1), delta(3)))
    assert queue.pop() == [scored, both, delta(2, "b")]
    assert queue.pop() == failed
    assert queue.pop() == [delta(4, "c")]
    assert queue.pop() == STOPPED


def test_a_reader_waits_for_the_next_event() -> None:
    async def main() -> None:
        queue = EventQueue()
        reader = asyncio.create_task(queue.wait())
        await asyncio.sleep(0)
        assert not reader.done()
        queue.put(delta(1))
        queue.put(delta(2))
        assert await reader
        assert drain(queue) == [delta(1), delta(2)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.wait(), 0.01)
        queue.put(delta(3))
        assert await queue.wait()
        assert queue.pop() == [delta(3)]

    asyncio.run(main())


def test_a_silence_is_reported_once_it_is_long_enough() -> None:
    async def main() -> None:
        queue, loop = EventQueue(), asyncio.get_running_loop()
        for number in range(10):  # each ends the silence before it is long enough
            loop.call_later(0.02, queue.put, delta(number))
            assert await queue.wait(0.1)
            queue.pop()
        for _ in range(2):
            started = loop.time()
            assert not await queue.wait(0.1)
            assert loop.time() - started >= 0.1
        loop.call_later(0.2, queue.put, delta(0))
        assert await queue.wait()  # only readers that ask for silence are woken
        queue.close()

    asyncio.run(main())
