"""What a request needed is freed when it ends, not when the garbage collector comes to it."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import wait_until
from tests.server.live import LiveServer, live_server, tiny_settings

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def server(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tiny_settings(tiny_checkpoint, tmp_path / "data")) as running:
        yield running


@pytest.fixture
def collected() -> Iterator[list[Any]]:
    """Where what only the collector finds is kept."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "the", "max_tokens": 5}),
        ("completions", {"prompt": "the", "max_tokens": 5, **STREAM}),
        ("completions", {"prompt": "the", "max_tokens": 5, "logprobs": 2, **STREAM}),
        ("completions", {"prompt": "the", "max_tokens": -1}),
        ("responses", {"input": "the", "max_output_tokens": 5, "stream": True}),
    ],
)
def test_a_request_leaves_nothing_to_the_garbage_collector(
    server: LiveServer, collected: list[Any], path: str, body: dict[str, Any]
) -> None:
    def left() -> list[Any]:
        gc.collect()
        found = [each for each in collected if type(each).__module__.startswith("server.")]
        collected.clear()
        return found

    with server.client() as client:
        client.post(f"/v1/{path}", json=body)  # what is made once
        server.wait_until_idle()
        wait_until(lambda: not left())
        for _ in range(3):
            client.post(f"/v1/{path}", json=body)
        server.wait_until_idle()
        assert left() == []
