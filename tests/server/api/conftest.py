"""One live server for the tests without special settings."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.live import LiveServer, live_server, tiny_settings


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        model_name="tiny",
        max_prompt_tokens=2000,
        max_body_bytes=100_000,
        stream_keepalive_s=0.2,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def session_id(client: httpx.Client) -> str:
    return str(client.post("/v1/sessions").json()["id"])
