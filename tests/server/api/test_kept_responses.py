"""A server and the responses that an earlier one left in its store."""

import asyncio
import json
import time
from pathlib import Path

from server.serve import STORE_FILE
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import ResponseRecord, ResponseStatus
from tests.patience import wait_until
from tests.server.live import live_server, tiny_settings


def left_over(name: str, status: ResponseStatus, expires_at: float | None) -> ResponseRecord:
    return ResponseRecord(name, "", 1.0, expires_at, status, json.dumps({"status": status}))


async def leave(path: Path, *records: ResponseRecord) -> None:
    store = SQLiteStore(path)
    for record in records:
        await store.responses.insert(record)
    await store.close()


async def found(path: Path, name: str) -> ResponseRecord | None:
    store = SQLiteStore(path)
    record = await store.responses.get(name)
    await store.close()
    return record


def test_what_was_interrupted_is_told_and_what_is_over_is_erased(
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
    records = {n: asyncio.run(found(path, n)) for n in ("interrupted", "over", "kept")}
    assert records["over"] is None
    assert records["kept"] is not None
    assert records["kept"].status == "completed"
    assert records["interrupted"] is not None
    assert records["interrupted"].status == "failed"
