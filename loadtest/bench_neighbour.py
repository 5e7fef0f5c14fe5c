"""Impact of one key at its limits on another client: the client's latencies alone and with it.

    python -m loadtest.bench_neighbour --against ../before

A server of the default model and two keys. The one client asks for a few tokens again and again,
or has a small source compiled, or makes sessions; the other one sends, in turn, one request of 256
prompts, long prompts, long texts to be tokenised, sources that are slow to compile, and calls that
list its sessions. With `--against FOLDER`, another checkout of this repository, its server has the
same done to it first.
"""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from loadtest.processes import started

NEIGHBOUR, CLIENT = "key-of-the-neighbour", "key-of-the-client"
FLAGS = ("--api-key", NEIGHBOUR, "--api-key", CLIENT, "--log-level", "warning")
PATIENCE_S = 30.0
LEAVE_S = 5.0
"""How long the neighbour waits for an answer."""

Body = Callable[[int], tuple[str, dict[str, object] | None]]
"""Path and body of the request of a number; one without a body is a GET."""


def crowd(number: int) -> tuple[str, dict[str, object]]:
    del number
    return "/v1/completions", {"prompt": ["Once"] * 256, "max_tokens": 2000, "ignore_eos": True}


def long_prompt(number: int) -> tuple[str, dict[str, object]]:
    return "/v1/completions", {"prompt": [number % 4000, *[300, 301] * 8000], "max_tokens": 1}


def long_text(number: int) -> tuple[str, dict[str, object]]:
    return "/tokenize", {"prompt": f"{number} " + "There was once a little fox. " * 30_000}


def slow_source(number: int) -> tuple[str, dict[str, object]]:
    names = {f"p{i}": {"type": "string"} for i in range(5500)}
    schema = {"type": "object", "properties": names, "description": str(number)}
    return "/v1/completions", {"prompt": "x", "max_tokens": 1, "guided_json": schema}


def few_tokens(number: int) -> tuple[str, dict[str, object]]:
    return "/v1/completions", {"prompt": f"There was {number}", "max_tokens": 4}


def small_source(number: int) -> tuple[str, dict[str, object]]:
    regex = f"a{number}b"
    return "/v1/completions", {"prompt": "x", "max_tokens": 1, "guided_regex": regex}


def list_of_sessions(number: int) -> tuple[str, None]:
    del number
    return "/v1/sessions?limit=100", None


def new_session(number: int) -> tuple[str, dict[str, object]]:
    return "/v1/sessions", {"prompt": f"There was {number}"}


KINDS: dict[str, tuple[Body, int, Body]] = {
    "one request of 256 prompts": (crowd, 1, few_tokens),
    "8 prompts of 16,001 tokens": (long_prompt, 8, few_tokens),
    "8 texts of 870 kB": (long_text, 8, few_tokens),
    "8 slow sources": (slow_source, 8, small_source),
    "8 lists of 100 sessions": (list_of_sessions, 8, new_session),
}
"""The neighbour's requests, their concurrency, and the client's request."""


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """A server of the checkout in a folder, on a free port."""
    with started("server", "serve", *FLAGS, checkout=folder) as found:
        yield found.port


def ask(port: int, key: str, path: str, body: dict[str, object] | None, timeout_s: float) -> int:
    """The answer's status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        content = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def times(port: int, body: Body, seconds: float, start: int) -> tuple[list[float], int]:
    """Seconds of each of the client's requests, and how many were rejected or unanswered."""
    measured, bad, number, end = list[float](), 0, start, time.monotonic() + seconds
    while time.monotonic() < end:
        number += 1
        path, asked = body(number)
        began = time.monotonic()
        try:
            bad += ask(port, CLIENT, path, asked, PATIENCE_S) >= 300
        except TimeoutError:
            bad += 1
        measured.append(time.monotonic() - began)
        time.sleep(0.02)
    return measured, bad


@contextmanager
def beside(port: int, body: Body, count: int) -> Iterator[None]:
    """Within the context, the neighbour keeps `count` requests in flight."""
    stop = threading.Event()

    def send(first: int) -> None:
        number = first
        while not stop.is_set():
            number += count
            path, asked = body(number)
            with suppress(OSError, http.client.HTTPException):
                ask(port, NEIGHBOUR, path, asked, LEAVE_S)

    threads = [threading.Thread(target=send, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def described(measured: list[float], bad: int) -> str:
    ordered = sorted(measured)
    middle, p99 = (
        ordered[len(ordered) // 2],
        ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    )
    p50_ms, p99_ms = middle * 1e3, p99 * 1e3
    return f"{len(measured):4d} asked {bad:3d} bad  p50 {p50_ms:7.0f} ms  p99 {p99_ms:7.0f} ms"


def measure(folder: Path, seconds: float, kinds: list[str]) -> None:
    print(folder.resolve().name)
    with server(folder) as port:
        for number in range(100):
            ask(port, NEIGHBOUR, *new_session(number), PATIENCE_S)
        for name in kinds:
            body, count, asked = KINDS[name]
            times(port, asked, 1.0, 10_000)
            print(f"  {name:28} alone   {described(*times(port, asked, seconds, 20_000))}")
            with beside(port, body, count):
                found = described(*times(port, asked, seconds, 30_000))
            print(f"  {'':28} beside  {found}", flush=True)


def main(
    seconds: Annotated[float, typer.Option(help="Seconds per measurement.")] = 8.0,
    against: Annotated[Path | None, typer.Option(help="Another checkout.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these kinds.")] = None,
) -> None:
    """Measure."""
    for folder in (against, Path.cwd()):
        if folder is not None:
            measure(folder, seconds, [name for name in KINDS if not only or name in only])


if __name__ == "__main__":
    typer.run(main)
