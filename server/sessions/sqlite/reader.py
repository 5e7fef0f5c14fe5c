"""Read-only connections: reads and commits do not wait for each other."""

import asyncio
import queue
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from server.errors import StorageFailed
from server.sessions.sqlite.schema import connect
from server.sessions.sqlite.writer import storage_error
from server.threads import OWNER, FairThreads

NUM_READERS = 2

T = TypeVar("T")


class Readers:
    """Connections to a database that is already open; owners take turns."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error."""
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self.connections = [connect(path) for _ in range(NUM_READERS)]
        for db in self.connections:
            db.execute("PRAGMA query_only = ON")
            self._idle.put(db)
        self._threads = FairThreads(NUM_READERS, "store-reads")
        self._is_closed = False
        self._asked = set[asyncio.Future[None]]()
        """Reads in progress."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one snapshot, which includes all reported commits. Raises StorageFailed."""
        if self._is_closed:
            raise StorageFailed("the session store is closed")
        answered = asyncio.get_running_loop().create_future()
        self._asked.add(answered)
        try:
            return await self._threads.run(OWNER.get(), lambda: self._read(work))
        finally:
            self._asked.discard(answered)
            answered.set_result(None)

    async def close(self) -> None:
        """Finish pending reads."""
        self._is_closed = True
        if self._asked:
            await asyncio.wait(self._asked)
        await asyncio.to_thread(self._threads.close)
        for db in self.connections:
            db.close()

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self._idle.get()
        try:
            db.execute("BEGIN")
            try:
                return work(db)
            except Exception as error:
                # Its frames hold statements, which hold the snapshot, for which the writer waits.
                traceback.clear_frames(error.__traceback__)
                raise
            finally:
                db.execute("ROLLBACK")
        except Exception as error:
            raise storage_error(error) from error
        finally:
            self._idle.put(db)
