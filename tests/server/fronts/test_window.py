"""Windows: who sends waits for room, and is told of it in large pieces."""

import asyncio

from server.fronts.window import Taken, Window


def test_a_window_opens_with_room_or_when_nobody_takes_any_more() -> None:
    async def main() -> None:
        window = Window(10)
        await window.open()
        window.use(12)  # the last piece may go beyond
        for room in (3, None):
            waiting = asyncio.create_task(window.open())
            await asyncio.sleep(0)
            assert not waiting.done()
            if room is None:
                window.lift()
            else:
                window.give(room)
            await waiting
            window.use(1)
        await window.open()

    asyncio.run(main())


def test_room_too_small_opens_nothing() -> None:
    async def main() -> None:
        window = Window(0)
        window.use(5)
        waiting = asyncio.create_task(window.open())
        await asyncio.sleep(0)
        window.give(5)
        await asyncio.sleep(0)
        assert not waiting.done()
        window.give(1)
        await waiting

    asyncio.run(main())


def test_what_is_taken_is_told_by_halves_of_a_window() -> None:
    taken = Taken(100)
    told = [taken.add(20) for _ in range(10)]
    assert told == [0, 0, 60, 0, 0, 60, 0, 0, 60, 0]
