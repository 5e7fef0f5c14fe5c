"""One streamed request, and the times of the parts of its answer."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_ERROR_BYTES = 65536


class StreamError(Exception):
    """The stream reported an error; the message is its kind."""


@dataclass
class Sample:
    """Result of a request; times are seconds of `time.perf_counter`."""

    intended: float
    """Scheduled send time; all latencies are measured from it."""

    sent: float = 0.0
    text_at: list[float] = field(default_factory=list)
    """Times of the events with text."""

    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """From the server's usage, or else one per event with text."""

    is_resumed: bool = False
    error: str | None = None
    """Kind of the error; None for a complete answer."""

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds."""
        return self.text_at[0] - self.intended if self.text_at else None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds between events with text."""
        return [later - earlier for earlier, later in pairwise(self.text_at)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds."""
        if self.output_tokens < 2 or not self.text_at:
            return None
        return (self.text_at[-1] - self.text_at[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Seconds to the end of the answer."""
        return self.ended - self.intended


async def send(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], intended: float | None = None
) -> Sample:
    """Send a streaming request and read it to its end. All errors are recorded in the sample."""
    sent = time.perf_counter()
    sample = Sample(sent if intended is None else intended, sent)
    sample.is_resumed = "session_id" in body
    try:
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                sample.error = error_kind(response.status_code, await response.aread())
            else:
                await _read(response, sample)
    except StreamError as error:
        sample.error = f"stream: {error}"
    except httpx.TimeoutException:
        sample.error = "timeout"
    except httpx.ConnectError:
        sample.error = "connection refused"
    except httpx.TransportError:
        sample.error = "disconnected"
    sample.ended = time.perf_counter()
    return sample


async def _read(response: httpx.Response, sample: Sample) -> None:
    num_tokens, is_finished = None, False
    async for data in events(response):
        now = time.perf_counter()
        if data == b"[DONE]":
            is_finished = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamError("not JSON") from None
        if error := event.get("error"):
            fields = error if isinstance(error, dict) else {}
            raise StreamError(fields.get("code") or fields.get("type") or "error")
        for choice in event.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                sample.text_at.append(now)
            is_finished = is_finished or choice.get("finish_reason") is not None
        if usage := event.get("usage"):
            num_tokens = usage["completion_tokens"]
            sample.prompt_tokens = usage["prompt_tokens"]
    sample.output_tokens = len(sample.text_at) if num_tokens is None else num_tokens
    if not is_finished:
        raise StreamError("no end")


async def events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event of a stream (https://html.spec.whatwg.org/#event-stream)."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def error_kind(status: int, body: bytes) -> str:
    """The status, with the error's code or type if the body has one."""
    try:
        error = json.loads(body[:MAX_ERROR_BYTES])["error"]
        kind = error.get("code") or error.get("type") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        kind = ""
    return f"{status} {kind}".strip()


@dataclass
class Sessions:
    """Sessions of a latentd server; each has one turn at a time."""

    http: httpx.AsyncClient
    ids: list[str] = field(default_factory=list)
    _busy: dict[int, asyncio.Lock] = field(default_factory=dict)

    async def create(self, count: int, prompt: str) -> None:
        """Create sessions, each with an initial text. Raises RuntimeError if the server has no
        sessions."""
        for _ in range(count):
            response = await self.http.post("/v1/sessions", json={"prompt": prompt})
            if response.status_code != 201:
                kind = error_kind(response.status_code, response.content)
                raise RuntimeError(f"{self.http.base_url} cannot create sessions: {kind}")
            self.ids.append(response.json()["id"])

    def lock(self, rank: int) -> asyncio.Lock:
        """Held during a turn: a user sends no second turn before the first is answered."""
        return self._busy.setdefault(rank, asyncio.Lock())

    async def delete(self) -> None:
        """All of them, unless the server is gone."""
        with suppress(httpx.TransportError):
            for session_id in self.ids:
                await self.http.delete(f"/v1/sessions/{session_id}")
        self.ids.clear()
