"""Totals of the metrics over a run in which clients leave: they add up to what clients got."""

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.patience import wait_until
from tests.server.api.calls import BODY, plain_events, send
from tests.server.live import LiveServer, live_server, tiny_settings

PATH = "/v1/completions"
ENDLESS = {"max_tokens": 60_000, "ignore_eos": True, "stream": True}


class Told:
    """What the clients of one run were told."""

    def __init__(self) -> None:
        self.usages: list[dict[str, Any]] = []
        self.outcomes = Counter[str]()
        self.num_seen = 0
        """Tokens of the streams that were left, as far as they were read."""

        self.num_prompt_tokens_left = 0
        self.num_resumed_left = 0
        """What their sessions held."""


def test_totals_are_what_clients_got(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_checkpoint, tmp_path, max_running=3, max_waiting=50, warm_sessions=2
    )
    with live_server(settings) as server:
        told = [Told() for _ in range(3)]
        threads = [
            threading.Thread(target=_client, args=(server, random.Random(seed), each))
            for seed, each in enumerate(told)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = sum((each.outcomes for each in told), Counter[str]())
        wait_until(lambda: _answered(server) == expected)
        server.wait_until_idle()
        value = server.service.metrics.registry.get_sample_value
        usages = [usage for each in told for usage in each.usages]
        completed = sum(usage["completion_tokens"] for usage in usages)
        assert value("latentd_answer_tokens_total") == completed > 0
        generated = value("latentd_generation_tokens_total") or 0
        assert generated - completed >= sum(each.num_seen for each in told) > 0
        resumed = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        read = sum(usage["prompt_tokens"] for usage in usages) - resumed
        resumed += sum(each.num_resumed_left for each in told)
        read += sum(each.num_prompt_tokens_left for each in told)
        assert value("latentd_resumed_tokens_total") == resumed > 0
        assert value("latentd_prompt_tokens_total") == read
        assert value("latentd_request_duration_seconds_count") == (
            expected["ok"] + expected["cancelled"]
        )


def _answered(server: LiveServer) -> Counter[str]:
    outcomes = ("ok", "client_error", "server_error", "cancelled", "deadline_exceeded")
    counts = {outcome: int(server.num_answered(outcome)) for outcome in outcomes}
    return Counter({outcome: count for outcome, count in counts.items() if count})


def _client(server: LiveServer, rng: random.Random, told: Told) -> None:
    with server.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        for number in range(12):
            # Too short to be shared: each is read by the turn that it is of.
            body = {"prompt": [rng.randrange(3, 290) for _ in range(rng.randrange(2, 9))]}
            match number % 4:
                case 0:
                    _complete(client, body, told)
                case 1:
                    _complete(client, body | {"session_id": session_id}, told)
                case 2:
                    told.outcomes["client_error"] += 1
                    assert client.post(PATH, json=body | {"n": 1000}).status_code == 400
                case 3:
                    session = client.get(f"/v1/sessions/{session_id}").json()
                    told.num_resumed_left += session["tokens"]
                    _leave(server, body | ENDLESS | {"session_id": session_id}, told)


def _complete(client: httpx.Client, body: dict[str, Any], told: Told) -> None:
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(PATH, json=BODY | body | streams)
    *_, last, done = plain_events(response.text)
    assert done == "[DONE]"
    told.usages.append(last["usage"])
    told.outcomes["ok"] += 1


def _leave(server: LiveServer, body: dict[str, Any], told: Told) -> None:
    """Go away without a word once some tokens have come, so that the prompt has been read."""
    with send(server.url, body) as connection:
        seen = b""
        while seen.count(b"data: ") < 5:
            seen += connection.recv(1 << 16)
    told.num_seen += seen.count(b"data: ") - 1  # of the last one a part
    told.num_prompt_tokens_left += len(body["prompt"])
    told.outcomes["cancelled"] += 1
    # The session's next turn would be refused while this one is rolled back.
    wait_until(lambda: not server.service.ledger.is_busy(body["session_id"]))
