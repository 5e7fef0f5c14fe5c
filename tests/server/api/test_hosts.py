"""Host names: a page that points its own name at the loopback gets no access."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.api.hosts import HostMiddleware
from tests.patience import PATIENCE_S
from tests.server.live import LiveServer, live_server, tiny_settings


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8000", "LOCALHOST:1", "app.localhost", "localhost."),
        *("127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "latentd", "x:80"),
    ],
)
def test_on_the_loopback_its_names_are_known(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example"),
        *("127.0.0.1.evil.example", "10.0.0.1", "[::2]", "[", ".", ":80"),
    ],
)
def test_on_the_loopback_others_are_refused(client: httpx.Client, host: str) -> None:
    response = client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 421
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert "X-Request-ID" in response.headers
    assert client.get("/health/live", headers={"Host": host}).status_code == 200


def test_a_client_may_name_no_host(server: LiveServer) -> None:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port or 0), PATIENCE_S) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_names_can_be_chosen(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, allowed_hosts="llm.example,*.b.example")
    with live_server(settings) as running, running.client() as client:
        for host, status in [
            ("llm.example", 200),
            ("x.b.example:80", 200),
            ("x.y.b.example", 200),
            ("b.example", 421),
            ("x.llm.example", 421),
            ("localhost", 421),
            ("latentd", 421),
        ]:
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "127.8.9.1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "llm.example"}, False),
        ({"allowed_hosts": "*"}, False),
        ({"unix_socket": "some.socket"}, False),
        ({"host": "0.0.0.0", "allowed_hosts": "a.example"}, True),
    ],
)
def test_only_a_bind_to_the_loopback_is_strict_by_default(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], expected: bool
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, **changes)
    assert bool(settings.known_hosts) is expected
    if expected and "allowed_hosts" not in changes:
        knows = HostMiddleware(lambda *_: None, settings.known_hosts)._knows  # type: ignore[arg-type]
        assert knows("127.0.0.1")
        assert knows(settings.host)
