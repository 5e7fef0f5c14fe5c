"""The one thread that writes to the database.

All queued requests share one transaction and one fsync. A request that fails undoes only its own
part. Results are returned after the commit.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.errors import StorageFailed, StorageFull
from server.sessions.sqlite.files import StateFiles
from server.sessions.sqlite.schema import PAGE_BYTES, one_line
from server.sessions.sqlite.space import ReservedSpace
from server.sessions.store import StoreUsage

log = logging.getLogger(__name__)

MAX_BATCH = 256
PAGES_PER_STEP = 256
"""Database pages copied between two transactions."""

MAX_LOG_BYTES = 64 << 20
"""Readers keep the log from being reused from its start; at this size the writer waits for them."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    erases: bool
    """Whether deleted data must not remain on disk."""

    file: str | None
    """The state whose file is deleted unless the work returns True."""

    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Any]"


@dataclass(frozen=True)
class _Copy:
    path: Path
    at_end: Callable[[sqlite3.Connection], None]
    done: "concurrent.futures.Future[None]"


class Writer:
    """Runs requests, in order, in transactions."""

    def __init__(self, db: sqlite3.Connection, files: StateFiles, space: ReservedSpace) -> None:
        self.db = db
        self._files = files
        self._space = space
        self.total = _total(db)
        """Total usage of the store as of the last commit."""

        self.unused_bytes = _unused_bytes(db)
        """Free bytes in the database's file as of the last commit."""

        self._jobs: queue.SimpleQueue[_Job | _Copy | None] = queue.SimpleQueue()
        self._abandoned = set[asyncio.Future[Any]]()
        """Results of queued work whose callers were cancelled."""

        self._closing = self._closed = False
        self._must_erase = False
        """Whether deleted data is still in the write-ahead log."""

        self._thread = threading.Thread(target=self._main, name="session-store", daemon=True)
        self._thread.start()

    async def run(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        erases: bool = False,
        file: str | None = None,
    ) -> T:
        """Run the work and return its result, once durable. Raises StorageFailed.

        `file`: the state whose file the work refers to; it is deleted if the work fails or returns
        False, even if the caller was cancelled.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        if self._closing:
            raise StorageFailed("the session store is closed")
        self._jobs.put(_Job(work, erases, file, loop, answer))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not answer.done():
                self._abandoned.add(answer)
                answer.add_done_callback(self._forget)
            raise

    async def settle(self) -> None:
        """Wait for work whose callers were cancelled: their locks keep no reader away any more."""
        if self._abandoned:
            await asyncio.wait(set(self._abandoned))

    def _forget(self, answer: "asyncio.Future[Any]") -> None:
        self._abandoned.discard(answer)
        if not answer.cancelled():
            answer.exception()  # or asyncio logs that it was not retrieved

    def copy(self, path: Path, at_end: Callable[[sqlite3.Connection], None]) -> None:
        """Copy the database as of one moment; transactions continue during the copy and are
        included. At that moment `at_end` runs, and no transaction.

        Blocks; called from any other thread. Raises sqlite3.Error, OSError, and StorageFailed if
        the store is closed.
        """
        done = concurrent.futures.Future[None]()
        if self._closing:
            raise StorageFailed("the session store is closed")
        self._jobs.put(_Copy(path, at_end, done))
        done.result()

    async def close(self) -> None:
        """Finish queued work and close the database."""
        self._closing = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _main(self) -> None:
        while not self._closed:
            self._run_next()
        self.db.close()
        self._space.close()

    def _run_next(self) -> None:
        """Wait for work, and run all that is queued."""
        jobs = [self._jobs.get()]
        while len(jobs) < MAX_BATCH and not self._jobs.empty():
            jobs.append(self._jobs.get())
        self._closed = self._closed or None in jobs
        self._run_together([job for job in jobs if isinstance(job, _Job)])
        for job in jobs:
            if isinstance(job, _Copy):
                self._copy(job)

    def _copy(self, job: _Copy) -> None:
        """SQLite's online backup: what this connection writes between its steps is included."""
        try:
            with contextlib.closing(sqlite3.connect(job.path, isolation_level=None)) as copy:
                copy.execute("PRAGMA synchronous = OFF")  # nobody depends on this file yet
                self.db.backup(copy, pages=PAGES_PER_STEP, progress=self._between_steps)
                job.at_end(self.db)
                copy.execute("PRAGMA journal_mode = DELETE")
        except Exception as error:  # whatever failed, the thread must continue
            job.done.set_exception(error)
        else:
            job.done.set_result(None)

    def _between_steps(self, _status: int, remaining: int, _total: int) -> None:
        """No transaction may run between the last step and the end of the copy."""
        if self._closing:
            raise StorageFailed("the session store is closed")
        if remaining and not self._jobs.empty():
            self._run_next()

    def _run_together(self, jobs: Sequence[_Job]) -> None:
        """One transaction for all jobs; then their results.

        On a full disk the log may hold space that the database has: failed jobs are retried alone
        once the log is empty.
        """
        results = self._try(jobs)
        for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
            if isinstance(result, StorageFull):
                with contextlib.suppress(sqlite3.Error):
                    self._empty_log()
                [results[i]] = self._try([job])
        if not all(isinstance(result, Exception) for result in results):
            failed = self._erase(any(job.erases for job in jobs))
            if failed is not None:
                results = [
                    failed if job.erases else result
                    for job, result in zip(jobs, results, strict=True)
                ]
        for job, result in zip(jobs, results, strict=True):
            if job.file is not None and result is not True:
                with contextlib.suppress(OSError):  # deleted at the next start otherwise
                    self._files.delete(job.file)
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                job.loop.call_soon_threadsafe(_answer, job.answer, result)

    def _try(self, jobs: Sequence[_Job]) -> list[Any]:
        """The results of one transaction for all jobs, or the errors that undid them."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            results = [self._run_one(job) for job in jobs]
            total = _total(self.db)
            unused_bytes = _unused_bytes(self.db)
            self.db.execute("COMMIT")
        # whatever failed, all jobs get a result and the thread continues
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
            return [storage_error(error)] * len(jobs)
        self.total, self.unused_bytes = total, unused_bytes
        return results

    def _erase(self, something_deleted: bool) -> StorageFailed | None:
        """Empty the write-ahead log if it holds deleted data, including that of earlier failures,
        and delete the files of states without a checkpoint.

        Returns the error, if any; it is retried after the next transaction.
        """
        self._must_erase = self._must_erase or something_deleted
        try:
            if self._must_erase or self._space.log_bytes > MAX_LOG_BYTES:
                self._empty_log()
            self._must_erase = False
            self._delete_files()
        except (sqlite3.Error, OSError) as error:
            return storage_error(error)
        return None

    def _empty_log(self) -> None:
        """Move what the log holds into the database, once nobody reads what was there before.
        Raises sqlite3.Error."""
        try:
            is_busy, *_ = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self._space.refill()
        if is_busy:
            raise sqlite3.OperationalError("the log is still being read")

    def _delete_files(self) -> None:
        states = self.db.execute("SELECT state_id FROM files_to_delete").fetchall()
        for (state_id,) in states:
            others = "SELECT 1 FROM checkpoints WHERE state_id = ? AND blob IS NULL"
            if self.db.execute(others, [state_id]).fetchone() is None:
                self._files.delete(state_id)
        if states:
            self.db.execute("DELETE FROM files_to_delete")

    def _run_one(self, job: _Job) -> Any:
        """The job's result, or the error that undid it alone."""
        self.db.execute("SAVEPOINT one")
        try:
            result = job.work(self.db)
            [num_pages] = self.db.execute("PRAGMA page_count").fetchone()
            self._space.grow(num_pages * PAGE_BYTES)
        except Exception as error:  # whatever failed, other jobs and the thread continue
            if not self.db.in_transaction:  # SQLite rolled back everything
                raise
            self.db.execute("ROLLBACK TO one")
            result = error if isinstance(error, StorageFailed) else storage_error(error)
        self.db.execute("RELEASE one")
        return result


def _answer(answer: "asyncio.Future[Any]", result: Any) -> None:
    if answer.cancelled():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def storage_error(error: Exception) -> StorageFailed:
    """The error for clients when the store fails; also in the log."""
    message = f"the session store failed: {one_line(error)}"
    log.error(message)
    is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(
        error, "errno", None
    ) in (errno.ENOSPC, errno.EDQUOT)
    failed = StorageFull(message) if is_full else StorageFailed(message)
    failed.__cause__ = error
    return failed


def _unused_bytes(db: sqlite3.Connection) -> int:
    [num_pages] = db.execute("PRAGMA freelist_count").fetchone()
    return PAGE_BYTES * int(num_pages)


def _total(db: sqlite3.Connection) -> StoreUsage:
    return StoreUsage(
        *db.execute(
            """SELECT coalesce(sum(num_sessions), 0), coalesce(sum(num_responses), 0),
            coalesce(sum(num_states), 0), coalesce(sum(num_bytes), 0) FROM owners"""
        ).fetchone()
    )
