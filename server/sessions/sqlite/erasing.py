"""Erasing a key's data in a data folder, with or without a running server."""

import asyncio
import json
from pathlib import Path

from server.errors import StorageFailed
from server.sessions.erasure import erase_owner
from server.sessions.models import describe_counts
from server.sessions.sqlite.snapshots import connect
from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.sessions.store import StoreError


class EraseError(Exception):
    """The erasure was incomplete; the message is one line."""


def erase(data_dir: Path, owner: str) -> str:
    """Erase a key's data. Returns a description of what was erased. Raises EraseError."""
    try:
        connection = connect(data_dir)
        if connection is None:
            if not (data_dir / STORE_FILE).exists():
                raise StoreError(f"{data_dir / STORE_FILE}: no session store")
            return asyncio.run(_erase(data_dir / STORE_FILE, owner))
        with connection, connection.makefile("rw", encoding="utf-8") as lines:
            lines.write(json.dumps({"erase": owner}) + "\n")
            lines.flush()
            answer = json.loads(lines.readline() or '{"error": "the server has exited"}')
    except (StorageFailed, StoreError, OSError) as error:
        raise EraseError(str(error)) from error
    if "error" in answer:
        raise EraseError(f"the server could not erase everything: {answer['error']}")
    return str(answer["erased"])


async def _erase(path: Path, owner: str) -> str:
    store = SQLiteStore(path)
    try:
        return describe_counts(await erase_owner(store, owner)) or "nothing"
    finally:
        await store.close()
