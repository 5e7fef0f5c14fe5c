"""How much of a body may be under way: who sends waits, who takes gives room again."""

import asyncio


class Window:
    """Of the side that sends. Open while there is any room; the last piece may go beyond it."""

    def __init__(self, room: int) -> None:
        """`room` in bytes."""
        self._room = room
        self._is_void = False
        self._opened: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._room > 0 or self._is_void

    def use(self, num_bytes: int) -> None:
        """So much is under way."""
        self._room -= num_bytes

    def give(self, num_bytes: int) -> None:
        """So much has been taken."""
        self._room += num_bytes
        self._wake()

    def lift(self) -> None:
        """Nobody takes any more: there is nothing to wait for."""
        self._is_void = True
        self._wake()

    async def open(self) -> None:
        """Wait until there is room."""
        while not self.is_open:
            self._opened = asyncio.get_running_loop().create_future()
            await self._opened

    def _wake(self) -> None:
        if self.is_open and self._opened is not None and not self._opened.done():
            self._opened.set_result(None)


class Taken:
    """Of the side that takes: what it owes, told in large pieces so that telling costs little."""

    def __init__(self, window_bytes: int) -> None:
        self._least = window_bytes // 2
        self._owed = 0

    def add(self, num_bytes: int) -> int:
        """So much was taken. How much room to give now; often none."""
        self._owed += num_bytes
        if self._owed < self._least:
            return 0
        owed, self._owed = self._owed, 0
        return owed
