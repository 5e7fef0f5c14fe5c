"""One end of the socket between a core and a front."""

import asyncio
import logging
from collections.abc import Callable

from server.fronts.frames import Frame, FrameError, FrameKind, FrameReader, header

log = logging.getLogger(__name__)


class Link(asyncio.Protocol):
    """Reads and writes frames; those of one event loop iteration are written together."""

    def __init__(self, handle: Callable[[Frame], None], lost: Callable[[], None]) -> None:
        """`handle` is called with each frame, `lost` when the connection is lost."""
        self._handle = handle
        self._lost = lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._unsent: list[bytes] = []
        self._has_gone = False

    def send(self, kind: FrameKind, request: int = 0, payload: bytes = b"") -> None:
        """Send a frame, buffered until connected; dropped after the connection is lost."""
        if self._has_gone:
            return
        unsent = self._unsent
        if not unsent:
            self._loop.call_soon(self._flush)
        unsent.append(header(kind, request, len(payload)))
        unsent.append(payload)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._handle(frame)
        except FrameError as error:
            log.error("invalid data from the other process: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport, self._has_gone = None, True
        self._lost()

    def _flush(self) -> None:
        if self._transport is not None and self._unsent:
            unsent, self._unsent = self._unsent, []
            self._transport.write(b"".join(unsent))
