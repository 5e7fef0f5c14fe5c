"""Sending a load to a server: closed loop with a number of users, or open loop at a rate."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice

import httpx

from loadtest.client import PATHS, Sample, Sessions, error_kind, send
from loadtest.workload import Endpoint, Request, Workload, arrivals

STOPPED_S = 5.0
"""A sleep that is longer by so much: this program was stopped, as by SIGSTOP."""

FIRST_TEXT = "Once upon a time there was a little fox."


@dataclass
class Target:
    """A server under load."""

    http: httpx.AsyncClient
    model: str | None
    endpoint: Endpoint
    ignore_eos: bool
    temperature: float | None = None
    sessions: Sessions = field(init=False)

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.http)

    async def send(self, request: Request, intended: float | None = None) -> Sample:
        """A turn of a session waits for the one before it, which counts as its latency."""
        body = request.body(
            *(self.endpoint, self.model),
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
        )
        path = PATHS[self.endpoint]
        if request.rank is None:
            return await send(self.http, path, body, intended)
        began = time.perf_counter() if intended is None else intended
        async with self.sessions.lock(request.rank):
            body["session_id"] = self.sessions.ids[request.rank]
            return await send(self.http, path, body, began)


@dataclass(frozen=True)
class Access:
    """How to access the servers."""

    endpoint: Endpoint = "completions"
    model: str | None = None
    key: str | None = None
    ignore_eos: bool = False
    timeout_s: float = 600
    temperature: float | None = None
    keeps_connections: bool = True
    """Whether a request may go over the connection of one before: some servers close it at that
    moment."""


@asynccontextmanager
async def target(url: str, access: Access, sessions: int = 0) -> AsyncIterator[Target]:
    """A server by its URL, with sessions. Raises RuntimeError if it does not respond."""
    headers = {} if access.key is None else {"Authorization": f"Bearer {access.key}"}
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None if access.keeps_connections else 0
    )
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=access.timeout_s, limits=limits
    ) as http:
        model = access.model or await _first_model(http)
        found = Target(http, model, access.endpoint, access.ignore_eos, access.temperature)
        try:
            await found.sessions.create(sessions, FIRST_TEXT)
            yield found
        finally:
            await found.sessions.delete()


async def _first_model(http: httpx.AsyncClient) -> str | None:
    try:
        response = await http.get("/v1/models")
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        raise RuntimeError(f"no server responds at {http.base_url}: {error}") from None
    if response.status_code != 200:
        kind = error_kind(response.status_code, response.content)
        raise RuntimeError(
            f"{http.base_url}/v1/models returns {kind}; is it an OpenAI-compatible API?"
        )
    models = response.json().get("data") or []
    return models[0]["id"] if models else None


Progress = Callable[[], object]
"""Called after each request."""


async def closed(
    target: Target, workload: Workload, *, users: int, count: int, seed: int, progress: Progress
) -> list[Sample]:
    """Closed loop: each of `users` users sends the next request after the previous answer."""
    requests, samples = islice(workload.requests(seed), count), list[Sample]()

    async def user() -> None:
        for request in requests:
            samples.append(await target.send(request))
            progress()

    await asyncio.gather(*(user() for _ in range(users)))
    return samples


@dataclass(frozen=True)
class Stop:
    """A time in which this program was stopped, by `time.perf_counter`."""

    at: float
    seconds: float


async def opened(
    target: Target,
    workload: Workload,
    *,
    rate: float,
    count: int,
    seed: int,
    progress: Progress,
    stops: list[Stop] | None = None,
) -> list[Sample]:
    """Requests at a Poisson process's moments, whatever has become of those before.

    With `stops`, whenever this program was stopped the rest is put off by as long, and that is
    noted: otherwise all that was to be sent meanwhile comes at once.
    """
    requests = islice(workload.requests(seed), count)
    began = time.perf_counter()

    async def one(request: Request, intended: float) -> Sample:
        sample = await target.send(request, intended)
        progress()
        return sample

    tasks = list[asyncio.Task[Sample]]()
    async with asyncio.TaskGroup() as group:
        for request, at in zip(requests, arrivals(rate, count, seed), strict=True):
            now = time.perf_counter()
            due = max(now, began + at)
            await asyncio.sleep(due - now)
            late = time.perf_counter() - due
            if stops is not None and late > STOPPED_S:
                stops.append(Stop(due, late))
                began += late
            tasks.append(group.create_task(one(request, began + at)))
    return [task.result() for task in tasks]
