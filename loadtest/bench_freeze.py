"""How long one client's request keeps the server from the others, by the kind of its body.

    python -m loadtest freeze
    python -m loadtest freeze "tokenised, words" "a prompt"

A server of the default model. A process sends each body five times, one after the other, while
this one asks for /health/live without a pause, and notes the longest answer of each time. What the
server itself does is in all five, and so in the shortest of them; the longest has whatever else the
machine does in it, too. The bar is 50 ms for the middle one.
"""

import http.client
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Annotated

import typer

from loadtest.bench_http import server

BAR_S = 0.05
TIMES = 5
MOST = (4 << 20) - 1024
"""Bytes of a body."""

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
USER = '{"role":"user","content":"a"}'


def repeat(item: str, before: str, after: str) -> str:
    """`before`, so many items as there is space for, and `after`."""
    count = (MOST - len(before) - len(after)) // (len(item) + 1)
    return before + ",".join([item] * count) + after


def names(value: str, before: str, after: str) -> str:
    """An object with as many names as there is space for."""
    count = (MOST - len(before) - len(after)) // (len(value) + 10)
    return before + ",".join(f'"{i:06x}":{value}' for i in range(count)) + after


def text(piece: str) -> str:
    """A JSON string of as many pieces as there is space for."""
    return json.dumps(piece * ((MOST - 200) // len(json.dumps(piece))))


BODIES: dict[str, tuple[str, Callable[[], str]]] = {
    "nothing large": (COMPLETIONS, lambda: '{"prompt":"a","max_tokens":1}'),
    "unknown parameters": (COMPLETIONS, lambda: names("0", '{"prompt":"a",', "}")),
    "metadata of a chat": (CHATS, lambda: names("0", '{"messages":[],"metadata":{', "}}")),
    "metadata of a session": ("/v1/sessions", lambda: names("0", '{"metadata":{', "}}")),
    "biases": (COMPLETIONS, lambda: names('"x"', '{"prompt":"a","logit_bias":{', "}}")),
    "prompts of one token": (COMPLETIONS, lambda: repeat("[1]", '{"prompt":[', "]}")),
    "prompts of one letter": (COMPLETIONS, lambda: repeat('"a"', '{"prompt":[', "]}")),
    "token ids, two million": (COMPLETIONS, lambda: repeat("1", '{"prompt":[', "]}")),
    "token ids, 700,000": (COMPLETIONS, lambda: repeat("10000", '{"prompt":[', "]}")),
    "whole floats": (COMPLETIONS, lambda: repeat("100.0", '{"prompt":[', ",1.5]}")),
    "stop strings": (COMPLETIONS, lambda: repeat('"ab"', '{"prompt":"a","stop":[', "]}")),
    "messages": (CHATS, lambda: repeat(USER, '{"messages":[', "]}")),
    "numbers for messages": (CHATS, lambda: repeat("10000", '{"messages":[', "]}")),
    "a prompt": (COMPLETIONS, lambda: f'{{"prompt":{text("once upon a time ")}}}'),
    "a message": (CHATS, lambda: f'{{"messages":[{{"role":"user","content":{text("<|end|>")}}}]}}'),
    "an input": (RESPONSES, lambda: f'{{"input":{text("é")}}}'),
    "an enum": (
        COMPLETIONS,
        lambda: repeat("10000", '{"prompt":"a","structured_outputs":{"json":{"enum":[', "]}}}"),
    ),
    "choices": (
        COMPLETIONS,
        lambda: repeat('"ab"', '{"prompt":"a","structured_outputs":{"choice":[', "]}}"),
    ),
    "tokenised, one letter": ("/tokenize", lambda: json.dumps({"prompt": "a" * 1_000_000})),
    "tokenised, words": ("/tokenize", lambda: f'{{"prompt":{text("once upon a time ")}}}'),
    "tokenised, with names": (
        "/tokenize",
        lambda: json.dumps({"prompt": "q7" * 250_000, "return_token_strs": True}),
    ),
    "detokenised": ("/detokenize", lambda: json.dumps({"tokens": [300] * 800_000})),
    "probabilities of a prompt": (
        COMPLETIONS,
        lambda: json.dumps(
            {"prompt": [300] * 60_000, "max_tokens": 0, "echo": True, "logprobs": 3}
        ),
    ),
    "a blob that is none": ("/v1/sessions/import", lambda: "x" * 1_000_000),
}


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def send(port: int, name: str) -> int:
    """Send a body. Returns the answer's status."""
    path, make = BODIES[name]
    return ask(port, "POST", path, make().encode())


def main(
    kinds: Annotated[
        list[str] | None, typer.Argument(help="Bodies to send; all if not given.")
    ] = None,
) -> None:
    """Print the longest wait of another client by the kind of the body."""
    spawn = multiprocessing.get_context("spawn")
    with server("--log-level", "warning") as port, ProcessPoolExecutor(1, spawn) as sender:
        sender.submit(send, port, "nothing large").result()
        print(f"{'longest wait, ms':26}  status  shortest  middle  longest of {TIMES}")
        for name in kinds or BODIES:
            longest, status = list[float](), 0
            for _ in range(TIMES):
                sending = sender.submit(send, port, name)
                longest.append(_longest_wait_s(port, sending))
                status = sending.result()
            first, *_, last = sorted(longest)
            middle = statistics.median(longest)
            mark = "" if middle <= BAR_S else "  more than the bar"
            times = f"{first * 1e3:8.1f}  {middle * 1e3:6.1f}  {last * 1e3:7.1f}"
            print(f"{name:26}  {status:6}  {times}{mark}", flush=True)


def _longest_wait_s(port: int, sending: Future[int]) -> float:
    """Of a client that asks again and again while something is sent."""
    longest_s = 0.0
    while not sending.done():
        started = time.perf_counter()
        ask(port, "GET", "/health/live")
        longest_s = max(longest_s, time.perf_counter() - started)
    return longest_s
