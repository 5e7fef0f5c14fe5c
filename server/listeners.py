"""Listening sockets: TCP or Unix, with or without TLS, and metrics."""

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from model.files import check_file
from server.metrics import METRICS, Metrics
from server.settings import Settings


class ListenError(Exception):
    """The server cannot listen there; the message is one line."""


def bind(settings: Settings, stack: ExitStack) -> list[socket.socket]:
    """One listening socket per process."""
    count = settings.api_workers
    if settings.unix_socket is not None:
        first = stack.enter_context(_bind_unix(settings.unix_socket))
        stack.callback(settings.unix_socket.unlink, missing_ok=True)
        return [first, *(stack.enter_context(first.dup()) for _ in range(count - 1))]
    first = stack.enter_context(_bind(settings.host, settings.port))
    return [first] if count == 1 else _share(first, count, stack)


def _bind_unix(path: Path) -> socket.socket:
    """A socket for owner and group. A stale socket of a dead server is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen()  # marks the address as used; clients wait until the server is ready
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, before the slow part of startup."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.set_inheritable(True)
    return listener


def _share(first: socket.socket, count: int, stack: ExitStack) -> list[socket.socket]:
    """Replace `first` by `count` sockets that share its address.

    `first` was bound without sharing, so that another server on the address was noticed.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ListenError(f"--api-workers {count}: processes cannot share a port on this system")
    family, address = first.family, first.getsockname()
    first.close()
    listeners = []
    for _ in range(count):
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError as error:
            raise ListenError(
                f"cannot share {address[0]}:{address[1]}: {error.strerror}"
            ) from error
        listeners.append(listener)
    return listeners


def url_of(listener: socket.socket, settings: Settings) -> str:
    """URL of the listener."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    scheme = "https" if settings.tls_certificate else "http"
    host, port = address[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_certificate(settings: Settings) -> None:
    """Raises ListenError."""
    if settings.tls_certificate is None:
        return
    try:
        for file in filter(None, (settings.tls_certificate, settings.tls_key)):
            check_file(file)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        files = [str(file) for file in (settings.tls_certificate, settings.tls_key) if file]
        reason = error.strerror or str(error)
        raise ListenError(
            f"{', '.join(files)}: not a certificate with its key: {reason}"
        ) from error


@contextmanager
def metrics_server(settings: Settings, metrics: Metrics) -> Iterator[str]:
    """Serve metrics at `metrics_address`, in separate threads: even while the event loop lags.

    Yields the URL, or an empty string if there is no such address. Raises ListenError.
    """
    if settings.metrics_address is None:
        yield ""
        return
    host, _, port = settings.metrics_address.rpartition(":")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # name required by the base class
            if self.path.partition("?")[0] != METRICS:
                self.send_error(404)
                return
            text, content_type = metrics.exposition(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: it is polled."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET

    try:
        server = Server((host.strip("[]"), int(port)), Handler)
    except (OSError, OverflowError) as error:
        raise ListenError(f"cannot listen on {settings.metrics_address}: {error}") from error
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}{METRICS}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
