"""No request blocks the event loop, or holds the GIL, for long."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.types import ASGIApp, Message

from model import checkpoint
from server.api.app import create_app
from server.sessions.sqlite.store import SQLiteStore
from tests.server.api.chats import make_checkpoint
from tests.server.live import tiny_settings

BYTES = 4_000_000
CPU_S = 0.25
"""Limit of the process's CPU time between two ticks of the loop; other processes do not count."""

TRIES = 5
"""Repetitions: what blocks the loop does so each time; interruptions do not."""


def repeat(item: str, before: str, after: str) -> str:
    count = (BYTES - len(before) - len(after)) // (len(item) + 1)
    return before + ",".join([item] * count) + after


def names(value: str, before: str, after: str) -> str:
    return before + ",".join(f'"{i:06x}":{value}' for i in range(300_000)) + after


USER = '{"role":"user","content":"a"}'
CALLS: dict[str, tuple[str, Callable[[], str], int]] = {
    "unknown parameters": ("completions", lambda: names("0", '{"prompt":"a",', "}"), 400),
    "names of metadata": (
        "chat/completions",
        lambda: names("0", f'{{"messages":[{USER}],"metadata":{{', "}}"),
        400,
    ),
    "session's metadata": ("sessions", lambda: names("0", '{"metadata":{', "}}"), 400),
    "a session's prompt": ("sessions", lambda: repeat("10", '{"prompt":[', "]}"), 400),
    "biases": ("completions", lambda: names('"x"', '{"prompt":"a","logit_bias":{', "}}"), 400),
    "prompts": ("completions", lambda: repeat("[1]", '{"prompt":[', "]}"), 400),
    "texts": ("completions", lambda: repeat('"a"', '{"prompt":[', "]}"), 400),
    "token ids": ("completions", lambda: repeat("1", '{"prompt":[', "]}"), 400),
    "fewer token ids": ("completions", lambda: repeat("100000", '{"prompt":[', "]}"), 400),
    "floats": ("completions", lambda: repeat("1.0", '{"prompt":[', ",1.5]}"), 400),
    "wrong last id": ("completions", lambda: repeat("10000", '{"prompt":[', ',"x"]}'), 400),
    "stop strings": ("completions", lambda: repeat('"abc"', '{"prompt":"a","stop":[', "]}"), 400),
    "messages": ("chat/completions", lambda: repeat(USER, '{"messages":[', "]}"), 400),
    "numbers for messages": (
        "chat/completions",
        lambda: repeat("11111", '{"messages":[', "]}"),
        400,
    ),
    "lists in lists": ("responses", lambda: '{"input":' + "[" * BYTES, 400),
    "a text": ("completions", lambda: json.dumps({"prompt": "once " * (BYTES // 5)}), 400),
    "a message": (
        "chat/completions",
        lambda: json.dumps({"messages": [{"role": "user", "content": "x<|end|>" * (BYTES // 8)}]}),
        400,
    ),
    "an input": ("responses", lambda: json.dumps({"input": "é" * (BYTES // 6)}), 400),
    "an enum": (
        "completions",
        lambda: repeat('"ab"', '{"prompt":"a","structured_outputs":{"json":{"enum":[', "]}}}"),
        400,
    ),
    "choices": (
        "completions",
        lambda: repeat('"ab"', '{"prompt":"a","structured_outputs":{"choice":[', "]}}"),
        400,
    ),
    "logprobs of an input": (
        "responses",
        lambda: repeat(
            "1.25",
            '{"input":[{"role":"assistant","content":'
            '[{"type":"output_text","text":"x","logprobs":[',
            "]}]}]}",
        ),
        400,
    ),
    "tokenised": ("/tokenize", lambda: json.dumps({"prompt": "q7" * 400_000}), 200),
    "tokenised with names": (
        "/tokenize",
        lambda: json.dumps({"prompt": "漢字" * 100_000, "return_token_strs": True}),
        200,
    ),
    "detokenised": (
        "/detokenize",
        lambda: repeat("9", '{"tokens":[', "]}")[:1_500_000] + "9]}",
        200,
    ),
    "probabilities of a prompt": (
        "completions",
        lambda: json.dumps({"prompt": [9] * 30_000, "max_tokens": 0, "echo": True, "logprobs": 3}),
        200,
    ),
    "probabilities in a stream": (
        "completions",
        lambda: json.dumps(
            {"prompt": [9] * 30_000, "max_tokens": 0, "echo": True, "logprobs": 3, "stream": True}
        ),
        200,
    ),
}


async def call(app: ASGIApp, path: str, content: bytes) -> int:
    """Status of the response, whose body is ignored."""
    received, status = asyncio.Queue[Message](), 0
    received.put_nowait({"type": "http.request", "body": content})

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    path = path if path.startswith("/") else f"/v1/{path}"
    headers = [(b"content-type", b"application/json")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await app(scope | {"query_string": b"", "root_path": ""}, received.get, send)
    return status


async def longest_tick_s(work: "asyncio.Task[int]") -> float:
    """The maximum CPU time of the process between two ticks of the loop until the work is done."""
    longest, last = 0.0, time.process_time()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_others_are_served_meanwhile(name: str, tmp_path: Path) -> None:
    path, make, expected = CALLS[name]
    content, folder = make().encode(), make_checkpoint(tmp_path / "model")

    async def main() -> None:
        settings = tiny_settings(folder, tmp_path)
        loaded = checkpoint.load(settings.checkpoint, torch.device("cpu"))
        app = create_app(settings, loaded, SQLiteStore(tmp_path / "sessions.sqlite3"))
        async with app.router.lifespan_context(app):
            longest = list[float]()
            while not longest or (min(longest) > CPU_S and len(longest) < TRIES):
                work = asyncio.create_task(call(app, path, content))
                longest.append(await longest_tick_s(work))
                assert work.result() == expected
            assert min(longest) <= CPU_S

    asyncio.run(main())
