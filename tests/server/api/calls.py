"""Requests to the completions endpoint, and parsing of the responses."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from server.api.schemas.completions import Completion
from tests.patience import PATIENCE_S

BODY: dict[str, Any] = {"prompt": "the cat", "max_tokens": 24, "seed": 7, "ignore_eos": True}


def send(url: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """A connection with a completion request; closing it disconnects."""
    address = urlsplit(url)
    content = json.dumps(body).encode()
    facts = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(content)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in (facts | headers).items())
    connection = socket.create_connection((address.hostname, address.port or 80), PATIENCE_S)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
    return connection


def complete(client: httpx.Client, **changes: object) -> dict[str, Any]:
    """A completion, checked against the documented schema."""
    response = client.post("/v1/completions", json=BODY | changes)
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.text)
    return dict(response.json())


def text_of(client: httpx.Client, **changes: object) -> str:
    """The text of a completion's first choice."""
    return str(complete(client, **changes)["choices"][0]["text"])


def stream(client: httpx.Client, **changes: object) -> list[Any]:
    """Data of the events of a plain stream."""
    response = client.post("/v1/completions", json=BODY | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(plain_events(response.text))


def plain_events(text: str) -> Iterator[Any]:
    """Data of events without ids; each event and each comment is a separate block."""
    *blocks, last = text.split("\n\n")
    assert last == ""
    for block in blocks:
        if block != ": keep-alive":
            name, data = block.split(": ", 1)
            assert (name, data.count("\n")) == ("data", 0), block
            yield data if data == "[DONE]" else json.loads(data)


def streamed_text(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [c for event in events[:-1] for c in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)
