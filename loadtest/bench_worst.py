"""Impact of the most expensive requests on another client: the gaps between its tokens.

    python -m loadtest.bench_worst

A server of the default model. One client reads a plain stream: alone, next to a plain request of 16
choices, and next to requests of 16 choices with one parameter at its limit each. Interleaved over
several rounds; medians are shown.
"""

import asyncio
import json
import socket
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated

import httpx
import typer

from loadtest.bench_http import PROMPT, server, stream

CHOICES = 16
WARM_TOKENS = 120
"""Tokens of the other client's stream, during which REPEATED grows to 1,000 characters."""

REPEATED = " something"
"""A long token."""

Body = dict[str, object]


def requests(repeated: int, vocab_size: int) -> dict[str, Body]:
    """Requests with the maximum of each parameter, by name. `repeated` is the id of REPEATED."""
    held = REPEATED * (1000 // len(REPEATED))
    stops = [held + chr(0x4E00 + i) for i in range(16)]
    # The first holds back all similar text, where no prefix of the others ends.
    near = [held + ".", *(stop[-1] + held for stop in stops[1:])]
    ids = range(vocab_size - 300, vocab_size)
    kinds: dict[str, Body] = {
        "plain": {},
        "stop": {"stop": stops},
        "stop that nearly matches": {"stop": near, "logit_bias": {str(repeated): 100}},
        "return_token_ids": {"return_token_ids": True},
        "logprobs": {"logprobs": 20, "max_tokens": 262_144 // (CHOICES * 21)},
        "penalties": {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1},
        "logit_bias": {"logit_bias": {str(i): -1.0 for i in ids}},
        "stop_token_ids": {"stop_token_ids": list(ids[:256]), "min_tokens": 700},
        "top_k, top_p, min_p": {"top_k": 1000, "top_p": 0.95, "min_p": 1e-4},
        "top_p of almost all": {"top_p": 1 - 1e-13},
        "usage in events": {
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}
        },
    }
    kinds["all of these"] = {name: value for kind in kinds.values() for name, value in kind.items()}
    return kinds


@contextmanager
def beside(port: int, body: Body | None) -> Iterator[None]:
    """Within the context a client reads a stream of this request, if given."""
    if body is None:
        yield
        return
    content = json.dumps(
        {"prompt": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 4096, "n": CHOICES}
        | body
    ).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content) + content
    )
    first = connection.recv(65536)
    if b" 200 " not in first[:20]:
        raise RuntimeError(first.decode(errors="replace"))

    def read() -> None:
        try:
            while connection.recv(1 << 20):
                pass
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        connection.shutdown(socket.SHUT_RDWR)
        reader.join()
        connection.close()


def gaps(port: int, tokens: int) -> tuple[float, float]:
    """Median and 99th percentile of the seconds between the tokens of a plain stream."""
    times = list[float]()
    body: Body = {"prompt": PROMPT, "max_tokens": tokens + WARM_TOKENS, "seed": 1}
    asyncio.run(stream(port, body, times))
    found = sorted(later - earlier for earlier, later in pairwise(times[WARM_TOKENS:-2]))
    return statistics.median(found), found[len(found) * 99 // 100]


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[
        int, typer.Option(min=100, help="Tokens of the other client's stream.")
    ] = 300,
    only: Annotated[list[str] | None, typer.Option(help="Only these requests.")] = None,
) -> None:
    """Print the gaps of the other client."""
    with server("--log-level", "warning") as port:
        base = f"http://127.0.0.1:{port}"
        asked = {"prompt": "the", "max_tokens": 0}
        httpx.post(f"{base}/v1/completions", json=asked, timeout=60).raise_for_status()
        asked = {"prompt": REPEATED, "add_special_tokens": False}
        [repeated] = httpx.post(f"{base}/tokenize", json=asked, timeout=60).json()["tokens"]
        kinds: dict[str, Body | None] = {"alone": None}
        kinds |= requests(repeated, 2000)
        kinds = {name: body for name, body in kinds.items() if not only or name in only}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, body in kinds.items():
                with beside(port, body):
                    found[name].append(gaps(port, tokens))
    print(f"{'beside':26} {'gap p50':>9} {'gap p99':>9}")
    for name, pairs in found.items():
        p50, p99 = (statistics.median(values) * 1000 for values in zip(*pairs, strict=True))
        print(f"{name:26} {p50:6.2f} ms {p99:6.2f} ms")


if __name__ == "__main__":
    typer.run(main)
