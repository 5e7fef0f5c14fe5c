"""Bodies with a Content-Encoding, decoded as they arrive, never beyond the body limit."""

import asyncio
import importlib
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

UNDECODABLE = "the body does not match its Content-Encoding"
WINDOW_LOG_MAX = 23
"""8 MiB, which every zstd decoder must support (RFC 8878, 3.1.1.1.2); frames may require more."""

Make = Callable[[bytes], Any]
"""Creates a decoder, with zlib's interface, for data that begins with these bytes."""


def decoded(receive: Receive, headers: Headers, most: int) -> Receive:
    """A `receive` that decodes the body. Raises HTTPException for an unknown encoding (415), an
    invalid body (400), and beyond `most` bytes (413), after which nothing more is decoded."""
    given = headers.getlist("content-encoding")
    names = [name.strip().lower() for name in ",".join(given).split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if not codings:
        return receive
    decoder, num_bytes = _Decoder(CODINGS.get(codings[0])), 0

    async def receive_decoded() -> Message:
        nonlocal num_bytes
        message = await receive()
        if message["type"] != "http.request":
            return message
        if len(codings) > 1 or not decoder.is_known:
            raise HTTPException(415, headers={"Accept-Encoding": ", ".join(CODINGS)})
        data, is_last = message.get("body", b""), not message.get("more_body", False)
        try:
            data = await asyncio.to_thread(decoder.decode, data, most - num_bytes + 1)
        except Exception as error:  # libraries have their own errors
            raise HTTPException(400, UNDECODABLE) from error
        num_bytes += len(data)
        if num_bytes > most:
            raise HTTPException(413)
        if is_last and not decoder.is_complete:
            raise HTTPException(400, UNDECODABLE)
        return {**message, "body": data}

    return receive_decoded


class _Decoder:
    """Decodes one body, which may consist of several compressed members."""

    def __init__(self, make: Make | None) -> None:
        self._make = make
        self._piece: Any = None

    @property
    def is_known(self) -> bool:
        return self._make is not None

    @property
    def is_complete(self) -> bool:
        return self._piece is None or self._piece.eof

    def decode(self, data: bytes, most: int) -> bytes:
        """Decode at most `most` bytes. Raises what the library raises."""
        found = bytearray()
        while data and len(found) < most and self._make is not None:
            if self.is_complete:
                self._piece = self._make(data)
            found += self._piece.decompress(data, most - len(found))
            data = self._piece.unused_data
        return bytes(found)


def _gzip(begun: bytes) -> Any:
    del begun
    return zlib.decompressobj(31)


def _deflate(begun: bytes) -> Any:
    """Some clients omit the zlib header."""
    return zlib.decompressobj(15 if begun[0] & 0x0F == 8 else -15)


def _zstd(library: Any, begun: bytes) -> Any:
    del begun
    options = {library.DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    return library.ZstdDecompressor(options=options)


def _known() -> dict[str, Make]:
    known: dict[str, Make] = {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate}
    for name in ("backports.zstd", "compression.zstd"):  # Python has it from 3.14 on
        with suppress(ImportError):
            known["zstd"] = partial(_zstd, importlib.import_module(name))
    return known


CODINGS = _known()
