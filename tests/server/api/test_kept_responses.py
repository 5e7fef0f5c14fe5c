"""A server and the responses that an earlier one left in its store."""

import asyncio
import json
import time
from pathlib import Path

from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.sessions.store import Entry, Status
from tests.patience import wait_until
from tests.server.live import live_server, tiny_settings


def left_over(name: str, status: Status, expires_at: float | None) -> Entry:
    body = json.dumps({"status": status})
    return Entry("response", name, "", 1.0, 1.0, expires_at=expires_at, status=status, body=body)


async def leave(path: Path, *entries: Entry) -> None:
    store = SQLiteStore(path)
    for entry in entries:
        await store.insert(entry)
    await store.close()


async def stored(path: Path, name: str) -> Entry | None:
    store = SQLiteStore(path)
    entry = await store.get("response", name)
    await store.close()
    return entry


def test_interrupted_responses_are_reported_and_expired_ones_erased(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / STORE_FILE
    asyncio.run(
        leave(
            path,
            left_over("interrupted", "queued", None),
            left_over("over", "completed", time.time() - 1),
            left_over("kept", "completed", time.time() + 1000),
        )
    )
    often = tiny_settings(tiny_checkpoint, tmp_path, sweep_interval_s=0.05)
    with live_server(often) as server, server.client() as client:
        wait_until(lambda: "\nlatentd_responses 2.0" in client.get("/metrics").text)
    found = {n: asyncio.run(stored(path, n)) for n in ("interrupted", "over", "kept")}
    assert found["over"] is None
    assert found["kept"] is not None
    assert found["kept"].status == "completed"
    assert found["interrupted"] is not None
    assert found["interrupted"].status == "failed"
