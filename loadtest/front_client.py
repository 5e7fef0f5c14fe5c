"""A client that reads many streams with minimal work: bytes are counted, not parsed.

    python -m loadtest.front_client PORT ENDPOINT STREAMS TOKENS

Prints `ready` when all answers have begun, and one line of JSON (`Report`) at the end. One stream
in sixteen is stored completely: its events are parsed at the end for the delays.
"""

import json
import re
import resource
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.front_server import MARK

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
SAMPLE_INTERVAL = 16
_MARK = MARK.encode()
_CHUNK = re.compile(rb"\r\n[0-9a-f]+\r\n")


@dataclass
class Report:
    """What a client measured."""

    tokens: int
    events: int
    seconds: float
    """Seconds from the first token to the last."""

    cpu_s: float
    delays_ms: list[float]
    """Seconds from emission to reception, for the stored streams."""


class Stream:
    """One request and its answer so far."""

    def __init__(self, port: int, endpoint: str, tokens: int, *, is_retained: bool) -> None:
        self.endpoint, self.expected = endpoint, tokens
        self.tokens = self.events = 0
        self.has_begun = False
        self.kept: list[bytes] | None = [] if is_retained else None
        self.delays_ms: list[float] = []
        self.tail = b""
        self.socket = socket.create_connection(("127.0.0.1", port))
        body: dict[str, Any] = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
        body["stream_options"] = {"include_usage": True}
        if endpoint == "chat":
            body["messages"] = [{"role": "user", "content": "a"}]
        else:
            body["prompt"] = [1]
        content = json.dumps(body).encode()
        self.socket.sendall(
            f"POST {PATHS[endpoint]} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        self.socket.setblocking(False)

    def receive(self, piece: bytes) -> None:
        """Count the tokens in the next bytes."""
        self.has_begun = True
        count = piece.count(_MARK)
        self.tokens += count
        self.events += piece.count(b"data: ")
        if self.kept is not None:
            self.kept.append(piece)
            now_us = time.monotonic_ns() // 1000
            for sent in re.findall(_MARK + rb"(\d+) ", piece):
                self.delays_ms.append((now_us - int(sent)) / 1000)
        self.tail = piece if len(piece) > 2000 else (self.tail + piece)[-2000:]

    def check(self) -> None:
        """Raises RuntimeError unless every token arrived, in events that can be parsed."""
        usage = re.findall(rb'"completion_tokens":(\d+)', self.tail)
        if self.tokens != self.expected or not usage or int(usage[-1]) != self.expected:
            raise RuntimeError(f"{self.tokens} tokens of {self.expected}: {self.tail!r}")
        if self.kept is None:
            return
        head, _, chunks = b"".join(self.kept).partition(b"\r\n\r\n")
        if b" 200 " not in head:
            raise RuntimeError(f"not a stream: {head!r}")
        text = ""
        for event in _CHUNK.sub(b"", b"\r\n" + chunks).decode().split("\n\n")[:-1]:
            lines = dict(line.split(": ", 1) for line in event.split("\n") if ": " in line)
            if lines["data"] != "[DONE]":
                for choice in json.loads(lines["data"])["choices"]:
                    delta = (
                        choice["delta"] if self.endpoint == "chat" else {"content": choice["text"]}
                    )
                    text += delta.get("content", "")
        if text.count(MARK) != self.expected:
            raise RuntimeError(f"{text.count(MARK)} tokens of {self.expected}")


def read(streams: list[Stream]) -> tuple[float, float]:
    """Read all streams to their ends. Returns the times of the first and the last token."""
    waiting = selectors.DefaultSelector()
    for stream in streams:
        waiting.register(stream.socket, selectors.EVENT_READ, stream)
    num_open, num_begun, first = len(streams), 0, 0.0
    while num_open:
        for key, _ in waiting.select():
            stream = key.data
            piece = stream.socket.recv(1 << 18)
            if not piece:
                waiting.unregister(stream.socket)
                num_open -= 1
                continue
            if not stream.has_begun:
                num_begun += 1
                if num_begun == len(streams):
                    print("ready", flush=True)
            stream.receive(piece)
            if not first and stream.tokens:
                first = time.perf_counter()
    return first, time.perf_counter()


def main() -> None:
    """Read and report."""
    port, endpoint, num_streams, tokens = sys.argv[1:]
    streams = [
        Stream(int(port), endpoint, int(tokens), is_retained=i % SAMPLE_INTERVAL == 0)
        for i in range(int(num_streams))
    ]
    before = time.process_time()
    first, last = read(streams)
    cpu_s = time.process_time() - before
    for stream in streams:
        stream.check()
    report = Report(
        tokens=sum(stream.tokens for stream in streams),
        events=sum(stream.events for stream in streams),
        seconds=last - first,
        cpu_s=cpu_s,
        delays_ms=[delay for stream in streams for delay in stream.delays_ms],
    )
    print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    main()
