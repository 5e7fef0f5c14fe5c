"""`latentd keys erase`: all data of a key is erased, with or without a running server."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from server.api.app import erase_owner
from server.keys import Limits, add_key
from server.sessions.sqlite.snapshots import serve_snapshots
from server.sessions.sqlite.store import SQLiteStore
from tests.patience import PATIENCE_S
from tests.server.cli.commands import refused, stdout_of
from tests.server.live import LiveServer, live_server, tiny_settings

ENDLESS = {"prompt": [1], "max_tokens": 60_000, "ignore_eos": True, "stream": True}


@contextmanager
def client_with(server: LiveServer, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def fill(client: httpx.Client) -> None:
    text = {"prompt": [1, 2], "metadata": {"who": "me"}}
    session_id = client.post("/v1/sessions", json=text).json()["id"]
    body = {"prompt": [3], "max_tokens": 2, "session_id": session_id}
    for _ in range(2):
        assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post(f"/v1/sessions/{session_id}/fork").status_code == 201


@pytest.mark.long
@pytest.mark.parametrize("is_running", [True, False])
def test_a_key_holds_nothing_afterwards(
    is_running: bool, file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    key, secret = add_key(file, "app", Limits())
    _, other = add_key(file, "other", Limits())
    data = tmp_path / "data"
    settings = tiny_settings(tiny_checkpoint, data, key_file=file)
    erase = ("keys", "erase", "app", "--file", file, "--data-dir", data)
    with (
        live_server(settings) as server,
        client_with(server, secret) as client,
        client_with(server, other) as neighbour,
    ):
        fill(client)
        fill(neighbour)
        if is_running:
            store = server.service.ledger._store
            assert isinstance(store, SQLiteStore)
            body = ENDLESS | {"resumable": True}
            with (
                client.stream("POST", "/v1/completions", json=body) as running,
                serve_snapshots(store, data, partial(erase_owner, server.app)),
            ):
                assert stdout_of(*erase) == "erased 2 sessions\n"
                assert "cancelled" in "".join(running.iter_lines())
            assert client.get("/v1/usage").json()["bytes"] == 0
            assert client.get("/v1/sessions").json()["data"] == []
            server.wait_until_idle()
    if not is_running:
        assert stdout_of(*erase) == "erased 2 sessions\n"
        assert stdout_of(*erase) == "erased nothing\n"
    with live_server(settings) as server, client_with(server, other) as neighbour:
        assert len(neighbour.get("/v1/sessions").json()["data"]) == 2
    erase_by_id = ("keys", "erase", key.id, "--file", file, "--data-dir", data)
    assert stdout_of(*erase_by_id) == "erased nothing\n"


def test_refusals_are_one_line(file: Path, tmp_path: Path) -> None:
    add_key(file, "app", Limits())
    asked = ("--file", file, "--data-dir", tmp_path / "none")
    assert "there is no key 'nobody'" in refused("keys", "erase", "nobody", *asked)
    assert "no session store" in refused("keys", "erase", "app", *asked)
