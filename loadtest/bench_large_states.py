"""Cost of committing and loading a large state: as a separate file, and as a blob in SQLite.

    python -m loadtest.bench_large_states [--turns 50] [--folder FOLDER]

Both stores alternate in one run; the database's other work is the same.
"""

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import typer

from server.sessions.ledger import new_session, new_state_id
from server.sessions.sqlite import store as sqlite_store
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, NewState

SIZES_MB = (0.27, 3.19, 34.0, 66.0)
"""State sizes: the default model, the paper's network, RWKV-7 with 7.2 B and with 13.3 B
parameters."""

KEEP_TURNS = 8
ALWAYS, NEVER = 0, 1 << 62
"""Blobs of at least this size are files."""


@dataclass
class Session:
    """One session of a store, and the durations of its turns."""

    store: SQLiteStore
    large_bytes: int
    entry: Entry = field(default_factory=lambda: new_session("", time.time(), {}, None))
    commit_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)

    async def turn(self, blob: bytes) -> None:
        """Commit a turn, which erases the oldest stored one, and load its state."""
        sqlite_store.LARGE_BYTES = self.large_bytes
        entry = replace(self.entry, turn=self.entry.turn + 1)
        started = time.perf_counter()
        await self.store.advance(entry, NewState(new_state_id(), blob), KEEP_TURNS)
        committed = time.perf_counter()
        loaded = await self.store.load(entry.id, entry.turn)
        self.load_s.append(time.perf_counter() - committed)
        self.commit_s.append(committed - started)
        self.entry = entry
        if loaded != blob:
            raise RuntimeError("the loaded state is not the committed one")


async def print_large_states(folder: Path, turns: int) -> None:
    """Measure and print, alternating between files and blobs."""
    stores = [SQLiteStore(folder / name / "sessions.sqlite3") for name in ("files", "blobs")]
    print(f"{'':8} {'commit: median, p99 ms':>31} {'load: median, p99 ms':>31}")
    print(f"{'MB':>8} {'file':>15} {'in SQLite':>15} {'file':>15} {'in SQLite':>15}  ratios")
    try:
        for size_mb in SIZES_MB:
            sessions = [Session(s, most) for s, most in zip(stores, (ALWAYS, NEVER), strict=True)]
            for session in sessions:
                await session.store.insert(session.entry)
            for number in range(KEEP_TURNS + turns):
                blob = os.urandom(round(size_mb * 1e6))
                for session in sessions[:: 1 - 2 * (number % 2)]:  # alternate which is first
                    await session.turn(blob)
            print(_row(size_mb, sessions), flush=True)
            for session in sessions:
                await session.store.delete("session", session.entry.id)
    finally:
        for store in stores:
            await store.close()


def _row(size_mb: float, sessions: list[Session]) -> str:
    """Without the first turns, which erased nothing."""
    columns, ratios = list[str](), list[str]()
    for times in ([s.commit_s for s in sessions], [s.load_s for s in sessions]):
        file, blob = (1e3 * np.percentile(of_one[KEEP_TURNS:], (50, 99)) for of_one in times)
        columns += [f"{median:7.2f} {p99:7.2f}" for median, p99 in (file, blob)]
        ratios.append(f"{file[0] / blob[0]:.2f}")
    return f"{size_mb:8} " + " ".join(columns) + "  " + " ".join(ratios)


def main(turns: int = 50, folder: Path | None = None) -> None:
    """Measure this many turns of each size, in a new folder below this one (the disk to
    measure)."""
    with tempfile.TemporaryDirectory(dir=folder) as new:
        asyncio.run(print_large_states(Path(new), turns))


if __name__ == "__main__":
    typer.run(main)
