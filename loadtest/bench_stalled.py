"""What clients cost that ask for a stream and never read it: memory, and others' speed.

    python -m loadtest.bench_stalled

A server of the default model. A client's speed alone is measured; then 200 others each ask for a
stream of so many tokens, with log-probabilities, and do not read; when all of them are written, the
server's memory and the client's speed are measured again. Events are so large that the kernel's
buffers, which are not the server's memory, hold less than a stream.
"""

import asyncio
import json
import re
import socket
import statistics
import time
from typing import Annotated

import httpx
import typer

from loadtest.bench_http import server, stream

PROMPT = "Once upon a time there was"


class Stalled:
    """A connection whose stream nobody reads."""

    def __init__(self, port: int, tokens: int) -> None:
        self._port = port
        self._tokens = tokens
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Ask for the stream."""
        with_little_room = socket.socket()
        with_little_room.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with_little_room.setblocking(False)
        await asyncio.get_running_loop().sock_connect(with_little_room, ("127.0.0.1", self._port))
        # A limit of one byte lets the reader pause the transport at once.
        _, self._writer = await asyncio.open_connection(sock=with_little_room, limit=1)
        body = {"prompt": PROMPT, "max_tokens": self._tokens, "stream": True, "ignore_eos": True}
        body |= {"logprobs": 5}
        content = json.dumps(body).encode()
        self._writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        await self._writer.drain()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


async def metric(client: httpx.AsyncClient, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", (await client.get("/metrics")).text, re.M)
    return float(found[1]) if found else 0.0


async def speed(port: int) -> float:
    """Tokens per second of one reading client, the median of five streams."""
    rates = []
    for seed in range(5):
        times = list[float]()
        tokens = await stream(
            port, {"prompt": PROMPT, "max_tokens": 400, "seed": seed, "ignore_eos": True}, times
        )
        rates.append((tokens - 1) / (times[-1] - times[0]))
    return statistics.median(rates)


async def measure(port: int, clients: int, tokens: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        await speed(port)
        alone, before = await speed(port), await metric(client, "process_resident_memory_bytes")
        stalled = [Stalled(port, tokens) for _ in range(clients)]
        for one in stalled:
            await one.open()
        generated = await metric(client, "latentd_generation_tokens_total")
        expected = generated + 0.9 * clients * tokens
        highest, started = before, time.monotonic()
        while await metric(client, "latentd_requests_running") or generated < expected:
            await asyncio.sleep(0.5)
            highest = max(highest, await metric(client, "process_resident_memory_bytes"))
            generated = await metric(client, "latentd_generation_tokens_total")
            if time.monotonic() - started > 3000:
                raise RuntimeError("the streams do not end")
        beside, held = await speed(port), await metric(client, "process_resident_memory_bytes")
        for one in stalled:
            one.close()
    mib = 1 << 20
    print(f"stalled streams                {clients} of {tokens:,} tokens")
    print(f"server's memory before         {before / mib:,.1f} MiB")
    print(f"highest while they are written {highest / mib:,.1f} MiB")
    print(f"when all are written           {held / mib:,.1f} MiB")
    print(f"a stalled stream               {(held - before) / clients / 1024:,.1f} KiB")
    print(f"a reading client alone         {alone:,.0f} tokens/s")
    print(f"beside the stalled ones        {beside:,.0f} tokens/s, {beside / alone:.2f} of it")


def main(
    clients: Annotated[int, typer.Option(min=1, help="Streams that nobody reads.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 5000,
) -> None:
    """Print what stalled streams cost."""
    with server("--log-level", "warning", "--stall-timeout-s", "3000") as port:
        asyncio.run(measure(port, clients, tokens))


if __name__ == "__main__":
    typer.run(main)
