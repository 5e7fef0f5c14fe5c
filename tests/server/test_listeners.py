"""Listening: Unix sockets, certificates, and a separate address for metrics."""

import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import trustme

from server.listeners import ListenError, bind, check_certificate, metrics_server, url_of
from server.metrics import Metrics
from server.settings import Settings
from tests.patience import PATIENCE_S
from tests.server.api.calls import complete, stream, text_of
from tests.server.cli import commands
from tests.server.live import live_server, tiny_settings
from tests.server.processes import server_process


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and a certificate of it for localhost: ca.pem, cert.pem, key.pem;
    both.pem has certificate and key."""
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "both.pem"))
    return folder


def test_a_unix_socket_is_for_its_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    settings = Settings(unix_socket=path)
    with ExitStack() as stack:
        [listener] = bind(settings, stack)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert url_of(listener, settings) == f"unix:{path}"
        with pytest.raises(ListenError, match="in use"), ExitStack() as other:
            bind(settings, other)  # also before the first one serves
    assert not path.exists()


def test_what_a_dead_server_left_is_replaced(tmp_path: Path, stack: ExitStack) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    bind(Settings(unix_socket=path), stack)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_file_is_not_replaced_by_a_socket(tmp_path: Path, stack: ExitStack) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ListenError, match=str(path)):
        bind(Settings(unix_socket=path), stack)
    assert path.read_text() == "precious"


def test_every_process_has_the_socket(tmp_path: Path, stack: ExitStack) -> None:
    settings = Settings(unix_socket=tmp_path / "socket", api_workers=3)
    listeners = bind(settings, stack)
    assert len({listener.fileno() for listener in listeners}) == 3
    assert {listener.getsockname() for listener in listeners} == {str(tmp_path / "socket")}


def test_a_wrong_certificate_is_named(certificates: Path, tmp_path: Path) -> None:
    def check(certificate: Path, key: Path | None) -> None:
        check_certificate(Settings(tls_certificate=certificate, tls_key=key))

    check(certificates / "cert.pem", certificates / "key.pem")
    check(certificates / "both.pem", None)
    for certificate, key in (
        (tmp_path / "none.pem", None),
        (certificates / "cert.pem", None),
        (certificates / "key.pem", certificates / "cert.pem"),
    ):
        with pytest.raises(ListenError, match=str(certificate)):
            check(certificate, key)


def test_metrics_at_an_address_of_their_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_checkpoint, tmp_path, metrics_address="127.0.0.1:0", api_key=("secret",)
    )
    with live_server(settings) as running, running.client() as client:
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/metrics").status_code == 404
    metrics = Metrics()
    metrics.prompt_tokens_total.inc(5)
    with metrics_server(settings, metrics) as url:
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        plain, open_metrics = httpx.get(url), httpx.get(url, headers=accept)
        assert "latentd_prompt_tokens_total 5.0" in plain.text
        assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert open_metrics.text.endswith("# EOF\n")
        assert httpx.get(url.removesuffix("/metrics")).status_code == 404
        address = url.removeprefix("http://").removesuffix("/metrics")
        conflicting = settings.model_copy(update={"metrics_address": address})
        with (
            pytest.raises(ListenError, match="cannot listen"),
            metrics_server(conflicting, metrics),
        ):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_tls(certificates: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path,
        tls_certificate=certificates / "cert.pem",
        tls_key=certificates / "key.pem",
    )
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    with live_server(settings) as server:
        url = server.url.replace("http:", "https:")
        with httpx.Client(base_url=url, timeout=PATIENCE_S, verify=trusting) as client:
            assert text_of(client)
            assert stream(client)[-1] == "[DONE]"
            endless = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=endless) as running:
                next(running.iter_lines())
        server.wait_until_idle()  # it has noticed that the client has left
        with httpx.Client(base_url=url) as client, pytest.raises(httpx.ConnectError):
            client.get("/v1/models")
        listed = commands.stdout_of(
            *("session", "list", "--url", url), SSL_CERT_FILE=str(certificates / "ca.pem")
        )
        assert listed.splitlines()[0].startswith("id")


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_on_a_unix_socket(tiny_checkpoint: Path, tmp_path: Path, workers: str) -> None:
    path = tmp_path / "socket"
    flags = ("--unix-socket", str(path), "--api-workers", workers)
    with server_process(tiny_checkpoint, tmp_path / "data", *flags) as server:
        assert server.url == f"unix:{path}"
        with server.client() as client:
            session_id = client.post("/v1/sessions").json()["id"]
            complete(client, session_id=session_id)
        shown = commands.stdout_of("session", "show", session_id, "--url", server.url)
        assert session_id in shown
        assert server.stop() == 0
    assert not path.exists()


@pytest.mark.long
def test_fronts_speak_tls(certificates: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--tls-certificate", str(certificates / "both.pem"), "--api-workers", "2")
    with server_process(tiny_checkpoint, tmp_path, *flags) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S, verify=trusting) as client:
            assert text_of(client)
        assert server.stop() == 0


@pytest.mark.long
def test_a_server_with_metrics_apart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--metrics-address", "127.0.0.1:0", "--metrics-names", "vllm")
    with server_process(tiny_checkpoint, tmp_path, *flags) as server, server.client() as client:
        [reported] = [line.split()[1] for line in server.facts if line.startswith("metrics")]
        complete(client)
        assert 'vllm:num_requests_running{model_name="tiny"}' in httpx.get(reported).text
        assert client.get("/metrics").status_code == 404
        assert server.stop() == 0
