"""Flow control of bodies: the sender waits for credit, the receiver grants it."""

import asyncio


class Window:
    """The sender's side. Open while there is any credit; the last piece may exceed it."""

    def __init__(self, credit: int) -> None:
        """`credit`: initial credit in bytes."""
        self._credit = credit
        self._is_lifted = False
        self._opened: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._credit > 0 or self._is_lifted

    def use(self, num_bytes: int) -> None:
        """Bytes were sent."""
        self._credit -= num_bytes

    def grant(self, num_bytes: int) -> None:
        """The receiver granted credit."""
        self._credit += num_bytes
        self._wake()

    def lift(self) -> None:
        """Lift the limit: the receiver is gone."""
        self._is_lifted = True
        self._wake()

    async def open(self) -> None:
        """Wait for credit."""
        while not self.is_open:
            self._opened = asyncio.get_running_loop().create_future()
            await self._opened

    def _wake(self) -> None:
        if self.is_open and self._opened is not None and not self._opened.done():
            self._opened.set_result(None)


class ReceiveWindow:
    """The receiver's side: grants credit in large pieces, to save frames."""

    def __init__(self, window_bytes: int) -> None:
        self._least = window_bytes // 2
        self._consumed = 0

    def add(self, num_bytes: int) -> int:
        """Bytes were consumed. Returns the credit to grant now, often 0."""
        self._consumed += num_bytes
        if self._consumed < self._least:
            return 0
        consumed, self._consumed = self._consumed, 0
        return consumed
