"""Erasing what a key holds in a data folder, whether a server uses it or not."""

import asyncio
import json
from pathlib import Path

from server.errors import StorageFailed
from server.sessions.erasure import erase_owner
from server.sessions.models import described
from server.sessions.sqlite.snapshots import connect
from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.sessions.store import StoreError


class EraseError(Exception):
    """Not everything was erased; one line says why."""


def erase(data_dir: Path, owner: str) -> str:
    """Erase it. Returns in words what there was. Raises EraseError."""
    try:
        connection = connect(data_dir)
        if connection is None:
            if not (data_dir / STORE_FILE).exists():
                raise StoreError(f"{data_dir / STORE_FILE}: there is no session store")
            return asyncio.run(_erase(data_dir / STORE_FILE, owner))
        with connection, connection.makefile("rw", encoding="utf-8") as lines:
            lines.write(json.dumps({"erase": owner}) + "\n")
            lines.flush()
            answer = json.loads(lines.readline() or '{"error": "the server has ended"}')
    except (StorageFailed, StoreError, OSError) as error:
        raise EraseError(str(error)) from error
    if "error" in answer:
        raise EraseError(f"the server could not erase all: {answer['error']}")
    return str(answer["erased"])


async def _erase(path: Path, owner: str) -> str:
    store = SQLiteStore(path)
    try:
        return described(await erase_owner(store, owner)) or "nothing"
    finally:
        await store.close()
