"""How long one request blocks the server for others, by kind of body.

    python -m loadtest freeze
    python -m loadtest freeze "tokenised, words" "a prompt"

A server of the default model. A process sends each body five times in sequence, while this one
polls /health/live without a pause and records the longest response each time. The shortest of the
five still contains all of the server's own work; the longest may contain other load of the machine.
The median must stay below 50 ms.
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
"""Size of a body in bytes."""

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
USER = '{"role":"user","content":"a"}'


def repeat(item: str, before: str, after: str) -> str:
    """`before`, as many items as fit, and `after`."""
    count = (MOST - len(before) - len(after)) // (len(item) + 1)
    return before + ",".join([item] * count) + after


def names(value: str, before: str, after: str) -> str:
    """An object with as many names as fit."""
    count = (MOST - len(before) - len(after)) // (len(value) + 10)
    return before + ",".join(f'"{i:06x}":{value}' for i in range(count)) + after


def text(piece: str) -> str:
    """A JSON string of as many pieces as fit."""
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
    "log-probabilities of a prompt": (
        COMPLETIONS,
        lambda: json.dumps(
            {"prompt": [300] * 60_000, "max_tokens": 0, "echo": True, "logprobs": 3}
        ),
    ),
    "an invalid blob": ("/v1/sessions/import", lambda: "x" * 1_000_000),
}


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """Status of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def send(port: int, name: str) -> int:
    """Send a body. Returns the response's status."""
    path, make = BODIES[name]
    return ask(port, "POST", path, make().encode())


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help="Bodies to send; default: all.")] = None,
) -> None:
    """Print another client's longest wait by kind of body."""
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
            mark = "" if middle <= BAR_S else "  above the limit"
            times = f"{first * 1e3:8.1f}  {middle * 1e3:6.1f}  {last * 1e3:7.1f}"
            print(f"{name:26}  {status:6}  {times}{mark}", flush=True)


def _longest_wait_s(port: int, sending: Future[int]) -> float:
    """Longest wait of a polling client while something is sent."""
    longest_s = 0.0
    while not sending.done():
        started = time.perf_counter()
        ask(port, "GET", "/health/live")
        longest_s = max(longest_s, time.perf_counter() - started)
    return longest_s
