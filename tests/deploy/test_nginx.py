"""Event streams through Debian's nginx, configured by deploy/nginx.conf."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deploy.programs import DEPLOY, daemon, free_port
from tests.patience import PATIENCE_S, wait_until
from tests.server.processes import ServerProcess, server_process

pytestmark = pytest.mark.external

LONGEST_SILENCE_S = 2
"""Read timeout of nginx in these tests."""

ENDLESS = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
MAIN = """\
daemon off;
{user}
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/answers;
    fastcgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    include {folder}/latentd.conf;
}}
"""


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@contextmanager
def nginx(server: ServerProcess, folder: Path) -> Iterator[httpx.Client]:
    """A client connected through nginx."""
    port = free_port()
    site = (DEPLOY / "nginx.conf").read_text()
    site = replaced(site, "listen 80;", f"listen 127.0.0.1:{port};")
    address = server.url.removeprefix("http://")
    site = replaced(site, "server 127.0.0.1:8000;", f"server {address};")
    site = replaced(site, "_timeout 10m;", f"_timeout {LONGEST_SILENCE_S}s;")
    (folder / "latentd.conf").write_text(site)
    main = MAIN.format(folder=folder, user="user root;" if os.geteuid() == 0 else "")
    (folder / "main.conf").write_text(main)
    url = f"http://127.0.0.1:{port}"
    with (
        daemon(f"{url}/health/live", "nginx", "-e", "stderr", "-c", folder / "main.conf"),
        httpx.Client(base_url=url, timeout=PATIENCE_S) as client,
    ):
        yield client


def gauge(server: ServerProcess, name: str) -> float:
    """A metric, read directly from the server."""
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(value)


def text_of(events: list[str]) -> str:
    """Text of the `data:` lines of a complete stream."""
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def data(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that runs one sequence at a time."""
    flags = ("--max-running", "1", "--stream-keepalive-s", "0.2")
    with server_process(tiny_checkpoint, tmp_path_factory.mktemp("data"), *flags) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess, tmp_path: Path) -> Iterator[httpx.Client]:
    with nginx(server, tmp_path) as through:
        yield through


def test_events_pass_at_once_and_a_disconnect_ends_the_stream(
    server: ServerProcess, client: httpx.Client
) -> None:
    with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        assert response.status_code == 200
        events = data(response)
        assert json.loads(next(events))["choices"][0]["finish_reason"] is None
        assert gauge(server, "latentd_requests_running") == 1  # the last byte is not yet made
    wait_until(lambda: gauge(server, "latentd_requests_running") == 0)


@contextmanager
def waiting(
    server: ServerProcess, client: httpx.Client
) -> Iterator[tuple[httpx.Response, httpx.Response]]:
    """A short stream through nginx, and the endless one it waits for."""
    short = {"prompt": "the cat", "max_tokens": 3, "stream": True}
    with (
        server.client() as direct,
        direct.stream("POST", "/v1/completions", json=ENDLESS) as first,
    ):
        events = data(first)
        next(events)
        with client.stream("POST", "/v1/completions", json=short) as second:
            yield second, first


def test_keep_alives_bridge_a_silence(server: ServerProcess, client: httpx.Client) -> None:
    """A stream that is silent for longer than the proxy's read timeout."""
    started = time.monotonic()
    with waiting(server, client) as (response, first):
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        assert gauge(server, "latentd_requests_waiting") == 1  # the comment came at once
        while time.monotonic() - started < 2 * LONGEST_SILENCE_S:
            assert next(lines) in ("", ": keep-alive")
        first.close()
        assert text_of([line[6:] for line in lines if line.startswith("data: ")])


def test_without_them_it_would_be_cut(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--max-running", "1", "--stream-keepalive-s", "600")
    with (
        server_process(tiny_checkpoint, tmp_path / "data", *flags) as server,
        nginx(server, tmp_path) as client,
        waiting(server, client) as (response, _),
        pytest.raises(httpx.RemoteProtocolError),
    ):
        response.read()


def test_a_stream_is_resumed(client: httpx.Client) -> None:
    body = ENDLESS | {"max_tokens": 400, "seed": 7}
    with client.stream("POST", "/v1/completions", json=body) as response:
        whole = text_of(list(data(response)))
    seen, last = list[str](), ""
    resumable = body | {"resumable": True}
    with client.stream("POST", "/v1/completions", json=resumable) as response:
        path = f"/v1/streams/{response.headers['X-Stream-ID']}"
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                last = value
            elif name == "data":
                seen.append(value)
            elif not line and len(seen) == 3:  # the end of the third event
                break
    with client.stream("GET", path, headers={"Last-Event-ID": last}) as response:
        rest = list(data(response))
    assert len(rest) > 1
    assert text_of(seen + rest) == whole


def test_metrics_are_not_for_clients(client: httpx.Client) -> None:
    assert client.get("/metrics").status_code == 404
    assert client.get("/v1/models").status_code == 200
