"""Windows: the sender waits for credit, which is granted in large pieces."""

import asyncio

from server.fronts.window import ReceiveWindow, Window


def test_a_window_opens_with_credit_or_when_the_receiver_is_gone() -> None:
    async def main() -> None:
        window = Window(10)
        await window.open()
        window.use(12)  # the last piece may go beyond
        for credit in (3, None):
            waiting = asyncio.create_task(window.open())
            await asyncio.sleep(0)
            assert not waiting.done()
            if credit is None:
                window.lift()
            else:
                window.grant(credit)
            await waiting
            window.use(1)
        await window.open()

    asyncio.run(main())


def test_too_little_credit_opens_nothing() -> None:
    async def main() -> None:
        window = Window(0)
        window.use(5)
        waiting = asyncio.create_task(window.open())
        await asyncio.sleep(0)
        window.grant(5)
        await asyncio.sleep(0)
        assert not waiting.done()
        window.grant(1)
        await waiting

    asyncio.run(main())


def test_consumed_bytes_are_granted_by_halves_of_a_window() -> None:
    receive_window = ReceiveWindow(100)
    granted = [receive_window.add(20) for _ in range(10)]
    assert granted == [0, 0, 60, 0, 0, 60, 0, 0, 60, 0]
