"""Gateway, link and front connection: what app and client see of each other through a socket."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.fronts.frames import ANSWER_WINDOW_BYTES, PIECE_BYTES, REQUEST_WINDOW_BYTES, FrameKind
from server.fronts.front_connection import App, FrontConnection
from server.fronts.gateway import Gateway
from server.fronts.link import Link
from tests.patience import PATIENCE_S, until

Message = MutableMapping[str, Any]
SCOPE = {
    **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"},
    **{"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 5), "scheme": "http", "root_path": ""},
    **{"method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []},
}
LARGE = bytes(range(256)) * 4096 * 3


class Client:
    """A request as uvicorn presents it, and its response."""

    def __init__(self, body: bytes = b"", *, reads: bool = True) -> None:
        self._pieces = [body[i : i + 50_000] for i in range(0, len(body), 50_000)] or [b""]
        self._gone, self._reading = asyncio.Event(), asyncio.Event()
        if reads:
            self._reading.set()
        self.num_received = 0
        self.status = 0
        self.body = b""
        self.is_complete = False

    def go(self) -> None:
        self._gone.set()
        self._reading.set()

    def read(self) -> None:
        self._reading.set()

    async def receive(self) -> Message:
        if self._pieces:
            body = self._pieces.pop(0)
            self.num_received += len(body)
            return {"type": "http.request", "body": body, "more_body": bool(self._pieces)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await self._reading.wait()
        self.body += message["body"]
        self.is_complete = not message["more_body"]


@asynccontextmanager
async def carried(app: App) -> AsyncIterator[tuple[Gateway, Link, list[str]]]:
    """A gateway whose core runs the app; the core's link; reports of readiness and end."""
    loop, logged = asyncio.get_running_loop(), list[str]()
    here, there = socket.socketpair()
    carrier = FrontConnection(app, set(), lambda: logged.append("ready"))
    await loop.create_unix_connection(lambda: carrier.link, sock=here)
    gateway = Gateway(lambda: logged.append("stop"))
    gateway.link = Link(gateway.handle, lambda: logged.append("lost"))
    await loop.create_unix_connection(lambda: gateway.link, sock=there)
    try:
        yield gateway, carrier.link, logged
    finally:
        carrier.link.close()
        gateway.link.close()
        await asyncio.sleep(0.01)


async def body_of(receive: Callable[[], Awaitable[Message]]) -> bytes:
    parts = list[bytes]()
    while (message := await receive())["type"] == "http.request":
        parts.append(message["body"])
        if not message["more_body"]:
            break
    return b"".join(parts)


async def echo(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    body = await body_of(receive)
    assert {name: scope[name] for name in SCOPE} == SCOPE
    await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": body})


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await main()

    asyncio.run(bounded())


@pytest.mark.parametrize("body", [b"", b"short", LARGE])
def test_bodies_of_any_size_go_there_and_back(body: bytes) -> None:
    async def main() -> None:
        async with carried(echo) as (gateway, _, _):
            clients = [Client(body) for _ in range(3)]
            await asyncio.gather(*(gateway(dict(SCOPE), c.receive, c.send) for c in clients))
            for client in clients:
                assert (client.status, client.is_complete) == (201, True)
                assert client.body == body

    run(main)


def test_an_app_that_does_not_read_holds_up_the_body() -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asked.wait()
            await echo(scope, receive, send)

        async with carried(app) as (gateway, _, _):
            client = Client(LARGE)
            request = asyncio.create_task(gateway(dict(SCOPE), client.receive, client.send))
            await until(lambda: client.num_received >= REQUEST_WINDOW_BYTES)
            await asyncio.sleep(0.1)
            assert client.num_received <= REQUEST_WINDOW_BYTES + 50_000
            asked.set()
            await request
            assert client.body == LARGE

    run(main)


def test_a_client_that_waits_to_be_asked_is_asked_when_the_app_reads() -> None:
    async def main() -> None:
        async def refuses(scope: Any, receive: Any, send: Any) -> None:
            del scope, receive
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body"})

        scope = SCOPE | {"headers": [(b"expect", b"100-continue")]}
        for app, num_received in ((refuses, 0), (echo_body, len(LARGE))):
            async with carried(app) as (gateway, _, _):
                client = Client(LARGE)
                await gateway(dict(scope), client.receive, client.send)
                assert client.is_complete
                assert client.num_received == num_received

    async def echo_body(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope | {"headers": []}, receive, send)

    run(main)


def test_a_client_that_does_not_read_holds_up_the_app() -> None:
    async def main() -> None:
        num_sent = 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal num_sent
            del scope, receive
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
                num_sent += 1000
            await send({"type": "http.response.body"})

        async with carried(app) as (gateway, _, _):
            client = Client(reads=False)
            request = asyncio.create_task(gateway(dict(SCOPE), client.receive, client.send))
            await until(lambda: num_sent >= ANSWER_WINDOW_BYTES)
            await asyncio.sleep(0.1)
            assert num_sent <= ANSWER_WINDOW_BYTES + PIECE_BYTES
            client.read()
            await request
            assert client.body == b"x" * 1_000_000

    run(main)


@pytest.mark.parametrize("is_stalled", [False, True])
def test_an_app_receives_its_clients_disconnect(is_stalled: bool) -> None:
    async def main() -> None:
        begun, heard = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            del scope
            await body_of(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            begun.set()
            if is_stalled:
                for _ in range(1000):
                    await send(
                        {"type": "http.response.body", "body": b"x" * 1000, "more_body": True}
                    )
            assert (await receive())["type"] == "http.disconnect"
            heard.set()

        async with carried(app) as (gateway, _, _):
            client = Client(reads=not is_stalled)
            request = asyncio.create_task(gateway(dict(SCOPE), client.receive, client.send))
            await begun.wait()
            await asyncio.sleep(0.05)
            assert not heard.is_set()
            client.go()
            await heard.wait()
            await request
            assert not client.is_complete

    run(main)


def test_a_front_that_is_lost_disconnects_its_requests() -> None:
    async def main() -> None:
        begun, heard = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            del scope, send
            await body_of(receive)
            begun.set()
            await receive()
            heard.set()

        async with carried(app) as (gateway, _, logged):
            client = Client()
            request = asyncio.create_task(gateway(dict(SCOPE), client.receive, client.send))
            await begun.wait()
            gateway.link.close()
            await heard.wait()
            request.cancel()
            await until(lambda: logged == ["lost"])

    run(main)


@pytest.mark.parametrize("begins", [False, True])
def test_an_app_that_fails_leaves_its_answer_incomplete(begins: bool) -> None:
    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            del scope, receive
            if begins:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ZeroDivisionError

        async with carried(app) as (gateway, _, _):
            client = Client()
            await gateway(dict(SCOPE), client.receive, client.send)
            assert (client.status, client.body) == ((200, b"half") if begins else (0, b""))
            assert not client.is_complete

    run(main)


def test_ready_and_stop_cross() -> None:
    async def main() -> None:
        async with carried(echo) as (gateway, core, logged):
            gateway.link.send(FrameKind.READY)
            core.send(FrameKind.STOP)
            await until(lambda: sorted(logged) == ["ready", "stop"])

    run(main)
