"""One live server for the commands that need one; it requires a key."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.live import LiveServer, live_server, tiny_settings

KEY, OTHER = "mine", "another's"


@pytest.fixture(scope="package")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = tiny_settings(tiny_checkpoint, tmp_path_factory.mktemp("data"), api_key=(KEY, OTHER))
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    """No sessions exist at the start of a test."""
    with server.client() as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        for session in client.get("/v1/sessions?limit=100").json()["data"]:
            client.delete(f"/v1/sessions/{session['id']}")
        yield client
