"""Totals of the metrics while clients disconnect and servers are killed: they add up to what
clients received."""

import random
import socket
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.patience import PATIENCE_S, wait_until
from tests.server.api.calls import BODY, plain_events, send
from tests.server.processes import ServerProcess, server_process

PATH = "/v1/completions"
ENDLESS = {"max_tokens": 60_000, "ignore_eos": True, "stream": True}
FLAGS = ("--max-running", "3", "--max-waiting", "50", "--warm-sessions", "2")
LIVES = 3
CLIENTS = 3


class Reported:
    """What one client received from one server."""

    def __init__(self) -> None:
        self.usages: list[dict[str, Any]] = []
        self.outcomes = Counter[str]()
        self.num_seen = 0
        """Tokens of abandoned streams, as far as they were read."""

        self.num_prompt_tokens_left = 0
        self.num_resumed_left = 0
        """Tokens of their sessions."""


@pytest.mark.long
def test_totals_are_what_clients_got(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sessions: list[str] = []
    lengths: dict[str, int] = {}
    for life in range(LIVES):
        with server_process(
            tiny_checkpoint, tmp_path / "data", *FLAGS, "--session-wait-s", str(PATIENCE_S)
        ) as server:
            with server.client() as client:
                if not sessions:
                    sessions = [client.post("/v1/sessions").json()["id"] for _ in range(CLIENTS)]
                assert {each: _length(client, each) for each in lengths} == lengths
            _live(server, sessions, life)
            with server.client() as client, ExitStack() as streams:
                lengths = {each: _length(client, each) for each in sessions}
                for session_id in sessions:  # turns that the kill takes with it
                    body = {"prompt": [5, 6]} | ENDLESS | {"session_id": session_id}
                    _read_some(streams.enter_context(send(server.url, body)))
                server.kill()


def _live(server: ServerProcess, sessions: list[str], life: int) -> None:
    """Clients during one life of the server, and the totals after them."""
    reported = [Reported() for _ in sessions]
    threads = [
        threading.Thread(
            target=_client, args=(server, random.Random(CLIENTS * life + seed), session_id, each)
        )
        for seed, (session_id, each) in enumerate(zip(sessions, reported, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = sum((each.outcomes for each in reported), Counter[str]())
    with server.client() as client:
        wait_until(lambda: _answered(client) == expected)
        wait_until(lambda: not _value(client, "latentd_slots", state="running"))
        usages = [usage for each in reported for usage in each.usages]
        completed = sum(usage["completion_tokens"] for usage in usages)
        assert _value(client, "latentd_answer_tokens_total") == completed > 0
        generated = _value(client, "latentd_generation_tokens_total")
        assert generated - completed >= sum(each.num_seen for each in reported) > 0
        resumed = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        read = sum(usage["prompt_tokens"] for usage in usages) - resumed
        resumed += sum(each.num_resumed_left for each in reported)
        read += sum(each.num_prompt_tokens_left for each in reported)
        assert _value(client, "latentd_resumed_tokens_total") == resumed > 0
        assert _value(client, "latentd_prompt_tokens_total") == read
        assert _value(client, "latentd_request_duration_seconds_count") == (
            expected["ok"] + expected["cancelled"]
        )


def _value(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _length(client: httpx.Client, session_id: str) -> int:
    return int(client.get(f"/v1/sessions/{session_id}").json()["tokens"])


def _answered(client: httpx.Client) -> Counter[str]:
    outcomes = ("ok", "client_error", "server_error", "cancelled", "deadline_exceeded")
    counts = {
        each: int(_value(client, "latentd_requests_total", endpoint=PATH, outcome=each))
        for each in outcomes
    }
    return Counter({outcome: count for outcome, count in counts.items() if count})


def _client(server: ServerProcess, rng: random.Random, session_id: str, reported: Reported) -> None:
    with server.client() as client:
        for number in range(8):
            # Too short to be shared: each is read by the turn that it is of.
            body = {"prompt": [rng.randrange(3, 290) for _ in range(rng.randrange(2, 9))]}
            match number % 4:
                case 0:
                    _complete(client, body, reported)
                case 1:
                    _complete(client, body | {"session_id": session_id}, reported)
                case 2:
                    reported.outcomes["client_error"] += 1
                    assert client.post(PATH, json=body | {"n": 1000}).status_code == 400
                case 3:
                    reported.num_resumed_left += _length(client, session_id)
                    # Goes away without a word, once the prompt has been read.
                    with send(server.url, body | ENDLESS | {"session_id": session_id}) as stream:
                        reported.num_seen += _read_some(stream)
                    reported.num_prompt_tokens_left += len(body["prompt"])
                    reported.outcomes["cancelled"] += 1


def _complete(client: httpx.Client, body: dict[str, Any], reported: Reported) -> None:
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(PATH, json=BODY | body | streams)
    *_, last, done = plain_events(response.text)
    assert done == "[DONE]"
    reported.usages.append(last["usage"])
    reported.outcomes["ok"] += 1


def _read_some(stream: socket.socket) -> int:
    """Number of complete tokens at the start of a stream."""
    seen = b""
    while seen.count(b"data: ") < 5:
        seen += stream.recv(1 << 16)
    return seen.count(b"data: ") - 1
