"""A proxy in front of a live server that records requests and corrupts streams on demand."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from tests.patience import PATIENCE_S

Spoil = Callable[[Iterator[bytes]], Iterator[bytes]]
"""From the chunks of a stream to what the client receives; then the connection breaks, unless the
stream is complete."""


class Proxy:
    """Proxies between a client and a server at `upstream`."""

    def __init__(self, upstream: str, url: str) -> None:
        self.upstream = upstream
        self.url = url
        self.turns: list[dict[str, Any]] = []
        """Bodies of the requested turns."""

        self.keys: list[str] = []
        """Their Idempotency-Keys."""

        self.spoils: deque[Spoil] = deque()
        """Corruptions for the next turns, one each."""

        self.is_polite = False
        """Whether a truncated stream looks complete at the HTTP level."""


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._pass_on(b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("/completions"):
                running.turns.append(json.loads(body))
                running.keys.append(self.headers["Idempotency-Key"])
            self._pass_on(body)

        def _pass_on(self, body: bytes) -> None:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() != "host"
            }
            with (
                httpx.Client(base_url=running.upstream, timeout=PATIENCE_S) as client,
                client.stream(self.command, self.path, headers=headers, content=body) as answer,
            ):
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers["content-type"])
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                spoil = None
                if self.path.endswith("/completions") and running.spoils:
                    spoil = running.spoils.popleft()
                chunks = answer.iter_raw()
                reported = b""
                for chunk in chunks if spoil is None else spoil(chunks):
                    reported += chunk
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if spoil is None or running.is_polite or b"[DONE]" in reported:
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        running = Proxy(upstream, f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


def cut_early(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Only the first events: the server notices the disconnect."""
    text = b""
    for chunk in chunks:
        text += chunk
        yield chunk
        if text.count(b"data:") >= 4:
            return


def cut_late(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The first events, after the server has sent all: it has committed the turn."""
    events = b"".join(chunks).split(b"\n\n")
    yield b"\n\n".join(events[:4]) + b"\n\n"


def fail_early(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """As if the server failed after the first events."""
    yield from cut_early(chunks)
    error = {"message": "the engine\x1b[2J broke", "type": "server_error", "param": None}
    yield b"data: %b\nid: 4\n\n" % json.dumps({"error": error | {"code": "x"}}).encode()
    yield b"data: [DONE]\nid: 5\n\n"


def say(text: str) -> Spoil:
    """Replace the first text."""

    def spoil(chunks: Iterator[bytes]) -> Iterator[bytes]:
        events = b"".join(chunks).split(b"\n\n")
        for number, event in enumerate(events):
            data = event.partition(b"data: ")[2].partition(b"\n")[0]
            if data.startswith(b"{"):
                facts = json.loads(data)
                for choice in facts["choices"]:
                    if "content" in choice["delta"]:
                        choice["delta"]["content"] = text if number == 1 else ""
                changed = json.dumps(facts, ensure_ascii=False).encode()
                event = b": keep-alive\ndata: %b\nid: %d" % (changed, number)
            if event:
                yield event + b"\n\n"

    return spoil
