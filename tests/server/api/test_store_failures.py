"""A failing store fails only the request concerned, with an error."""

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import NewState
from tests.patience import wait_until
from tests.server.api.calls import BODY, complete, stream, text_of
from tests.server.api.test_session_calls import content, error
from tests.server.api.test_sessions import get
from tests.server.live import LiveServer, live_server, tiny_settings
from tests.server.sessions.stores import forbidden, unreadable


@pytest.fixture
def alone(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server whose store can be made to fail, without a cache."""
    few = tiny_settings(tiny_checkpoint, tmp_path, host_cache_bytes=0, warm_sessions=0)
    with live_server(few) as running:
        yield running


def store_of(server: LiveServer) -> SQLiteStore:
    store = server.service.ledger._store
    assert isinstance(store, SQLiteStore)
    return store


@contextmanager
def full_disk(server: LiveServer) -> Iterator[None]:
    db = store_of(server)._writer.db
    [num_pages] = db.execute("PRAGMA page_count").fetchone()
    [most] = db.execute("PRAGMA max_page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {num_pages}")
    try:
        yield
    finally:
        db.execute(f"PRAGMA max_page_count = {most}")


@contextmanager
def broken_disk(server: LiveServer) -> Iterator[None]:
    store = store_of(server)
    with forbidden(store, sqlite3.SQLITE_TRANSACTION, "COMMIT"), unreadable(store):
        yield


def test_a_full_disk_is_reported_and_nothing_is_lost(alone: LiveServer) -> None:
    with alone.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        before, state = get(client, session_id), content(client, session_id)
        with full_disk(alone):
            for _ in range(2):
                answer = client.post("/v1/completions", json=BODY | {"session_id": session_id})
                assert error(answer) == (507, None, "storage_full")
                assert answer.headers["x-should-retry"] == "false"
            events = stream(client, session_id=session_id)
            assert events[-1] == "[DONE]"
            assert events[-2]["error"]["code"] == "storage_full"
            assert all(e["choices"][0]["finish_reason"] is None for e in events[:-2])
            assert error(client.post(f"/v1/sessions/{session_id}/fork"))[0] == 507
            blob = client.get(f"/v1/sessions/{session_id}/state").content
            assert error(client.post("/v1/sessions/import", content=blob))[0] == 507
            assert text_of(client)  # what needs no store goes on
            assert client.get("/health/ready").status_code == 200
        assert get(client, session_id) == before
        assert content(client, session_id) == state
        twin = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=twin)
        assert text_of(client, session_id=session_id) == text_of(client, session_id=twin)


def test_a_broken_disk_is_reported_and_nothing_is_lost(alone: LiveServer) -> None:
    with alone.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        before = get(client, session_id)
        with broken_disk(alone):
            for method, path in (
                ("POST", "/v1/sessions"),
                ("GET", "/v1/sessions"),
                ("GET", f"/v1/sessions/{session_id}"),
                ("DELETE", f"/v1/sessions/{session_id}"),
            ):
                assert error(client.request(method, path)) == (503, None, "storage_failed")
            answer = client.post("/v1/completions", json=BODY | {"session_id": session_id})
            assert error(answer) == (503, None, "storage_failed")
            assert text_of(client)
        assert get(client, session_id) == before
        assert text_of(client, session_id=session_id)


def test_a_damaged_state_is_named_and_an_earlier_one_can_be_used(alone: LiveServer) -> None:
    with alone.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        good = client.get(f"/v1/sessions/{session_id}/state").content
        damaged = NewState("damaged", good[:-1] + bytes([good[-1] ^ 1]))
        store = store_of(alone)

        async def damage() -> None:
            entry = await store.get("session", session_id)
            assert entry is not None
            assert await store.advance(replace(entry, turn=2), damaged, keep=8)

        asyncio.run(damage())
        answer = client.post("/v1/completions", json=BODY | {"session_id": session_id})
        assert error(answer) == (503, None, "session_damaged")
        assert answer.headers["x-should-retry"] == "false"
        message = json.loads(answer.text)["error"]["message"]
        assert session_id in message
        assert "rewind" in message
        exported = client.get(f"/v1/sessions/{session_id}/state")
        assert error(exported) == (503, None, "session_damaged")
        assert client.get(f"/v1/sessions/{session_id}/state", params={"turn": 1}).is_success
        client.post(f"/v1/sessions/{session_id}/rewind", json={"turn": 1})
        assert text_of(client, session_id=session_id)
        assert get(client, session_id)["turn"] == 2


def test_a_forged_state_fails_alone_and_is_reported(
    alone: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum is right and its numbers are finite, but the model cannot use them.

    Imports reject such states; if one were accepted, its turn would fail.
    """
    with alone.client() as client:
        session_id = client.post("/v1/sessions", json={"prompt": "the cat"}).json()["id"]
        codec = alone.service.ledger._codec
        whole = codec.decode(client.get(f"/v1/sessions/{session_id}/state").content)
        large = np.full(8, 1e308).tobytes()
        forged = codec.encode(replace(whole, state=large + whole.state[len(large) :]))
        refused = client.post("/v1/sessions/import", content=forged)
        assert refused.status_code == 422
        assert "numbers up to 1e+308" in refused.json()["error"]["message"]
        monkeypatch.setattr("server.sessions.codec.MAX_MAGNITUDE", math.inf)
        imported = client.post("/v1/sessions/import", content=forged).json()
        answer = client.post("/v1/completions", json=BODY | {"session_id": imported["id"]})
        assert error(answer) == (503, None, "session_damaged")
        assert "no valid probabilities" in answer.json()["error"]["message"]
        assert get(client, imported["id"])["turn"] == imported["turn"]
        assert text_of(client, session_id=session_id)


def test_expired_sessions_are_erased_when_the_disk_works_again(
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    often = tiny_settings(tiny_checkpoint, tmp_path, sweep_interval_s=0.05)
    with live_server(often) as server, server.client() as client:

        def stored() -> int:
            return store_of(server).total.num_sessions

        def num_failed() -> int:
            return sum("cannot be erased yet" in record.getMessage() for record in caplog.records)

        client.post("/v1/sessions", json={"ttl": 1000, "prompt": "the cat"})
        with broken_disk(server):
            monkeypatch.setattr(store_of(server), "now", lambda: time.time() + 2000)
            before = num_failed()
            wait_until(lambda: num_failed() > before + 1)
            assert stored() == 1
        wait_until(lambda: stored() == 0)
        assert client.get("/v1/sessions").json()["data"] == []
