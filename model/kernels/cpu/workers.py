"""Threads that run a compiled function together.

OpenMP's, which torch has, are not used: where a process has more of them than cores, as a server
has, they sleep at every barrier, and are woken up on whichever core; a token then takes as long on
two of them as on one. These look for work for `PATIENCE` before they sleep, and at every look let
others have the core: so does who waits at a barrier.
"""

import ctypes
import functools
import os
import threading
from typing import Any

import numpy as np
from numba import cfunc, int64
from numpy.typing import NDArray

from model.kernels.cpu.functions import (
    CACHE,
    FOREVER,
    SOURCE,
    call_with,
    count,
    count_up,
    jit,
    until,
)
from model.kernels.cpu.linear import array
from model.kernels.cpu.threads import ALONE

GIVEN, FUNCTION, ARGUMENTS, REST, MOST_LOOKS, DONE, ASLEEP = 0, 1, 2, 3, 4, 8, 9
"""Of a worker's numbers: how often it was given something to run, and what; how often it has done
so; whether it sleeps, or is about to. Who gives writes the first line of the cache, and the worker
the second."""

LINE = 64
"""Bytes of a line."""

NUMBERS = 2 * LINE // 8

PATIENCE = 5000
"""Looks for work before a worker sleeps: some milliseconds, more than between two steps."""


@jit
def _work(worker: Any) -> None:
    """Run what is given until nothing has come for a while. worker: the address of its numbers."""
    numbers = array(worker, (NUMBERS,), int64)
    numbers[ASLEEP] = 0
    while True:
        if not until(worker + 8 * GIVEN, numbers[DONE] + 1, numbers[MOST_LOOKS], numbers[REST]):
            count_up(worker + 8 * ASLEEP)
            if count(worker + 8 * GIVEN) == numbers[DONE]:
                return
            numbers[ASLEEP] = 0
        call_with(numbers[FUNCTION], numbers[ARGUMENTS])
        count_up(worker + 8 * DONE)


@jit
def _give(worker: Any, function: Any, arguments: Any) -> Any:
    """Have a worker run a function; whether it must be woken up."""
    numbers = array(worker, (NUMBERS,), int64)
    numbers[FUNCTION], numbers[ARGUMENTS] = function, arguments
    count_up(worker + 8 * GIVEN)
    return count(worker + 8 * ASLEEP)


@jit
def _finish(worker: Any) -> None:
    """Wait until a worker has done what it was given."""
    numbers = array(worker, (NUMBERS,), int64)
    until(worker + 8 * DONE, numbers[GIVEN], FOREVER, numbers[REST])


@functools.cache
def _functions() -> tuple[Any, Any, Any]:
    """`_work`, `_give` and `_finish` for Python, which others may run meanwhile."""
    source = SOURCE

    @cfunc("void(int64)", cache=CACHE)
    def work(worker: Any) -> None:
        if source:
            _work(worker)

    @cfunc("int64(int64, int64, int64)", cache=CACHE)
    def give(worker: Any, function: Any, arguments: Any) -> Any:
        return _give(worker, function, arguments) if source else 0

    @cfunc("void(int64)", cache=CACHE)
    def finish(worker: Any) -> None:
        if source:
            _finish(worker)

    return work.ctypes, give.ctypes, finish.ctypes


def _aligned(count: int) -> NDArray[np.int64]:
    """Numbers that have lines of the cache of their own."""
    numbers = np.zeros(count + LINE // 8, np.int64)
    first = -numbers.ctypes.data % LINE // 8
    return numbers[first : first + count]


class _Worker:
    """One thread, with its numbers in memory."""

    def __init__(self, rest: int, patience: int) -> None:
        self._cells = _aligned(NUMBERS)
        self._cells[REST], self._cells[MOST_LOOKS] = rest, patience
        self._at = self._cells.ctypes.data
        self._work, self._give, self._finish = _functions()
        self._woken = threading.Semaphore(0)
        threading.Thread(target=self._run, name="step", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work(self._at)
            self._woken.acquire()

    @property
    def is_asleep(self) -> bool:
        return bool(self._cells[ASLEEP])

    def give(self, function: int, arguments: int) -> None:
        if self._give(self._at, function, arguments):
            self._woken.release()

    def finish(self) -> None:
        self._finish(self._at)


class Workers:
    """Threads beside the one that calls; several callers have them in turn."""

    def __init__(self, rest: int, patience: int = PATIENCE) -> None:
        self._rest, self._patience = rest, patience
        self._lock = threading.Lock()
        self.threads: list[_Worker] = []
        self._arrived = _aligned(LINE // 8)

    def run(self, function: Any, arguments: NDArray[np.void], threads: int) -> None:
        """A compiled function on so many threads, each with its own copy of the record."""
        records = np.repeat(arguments.reshape(1), threads)
        of_threads = records["threads"]
        of_threads["thread"], of_threads["threads"] = np.arange(threads), threads
        of_threads["rest"], of_threads["arrived"] = self._rest, self._arrived.ctypes.data
        with self._lock:
            self._arrived[:] = 0
            while len(self.threads) < threads - 1:
                self.threads.append(_Worker(self._rest, self._patience))
            used, first = self.threads[: threads - 1], records.ctypes.data
            for place, worker in enumerate(used, 1):
                worker.give(function.address, first + place * records.itemsize)
            function.ctypes(first)
            for worker in used:
                worker.finish()


def _rest() -> int:
    """The address of the function that lets others have a thread's core; 0 if there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


@functools.cache
def _workers(process: int) -> Workers | None:
    """Those of a process, if it may have any."""
    del process
    rest = _rest()
    return Workers(rest) if rest else None


def prepare() -> None:
    """Compile what threads run while they wait, so that no step does."""
    _functions()


def run_on_threads(function: Any, arguments: NDArray[np.void], threads: int) -> None:
    """Run a compiled function on a record, on so many threads; sets its `threads`."""
    workers = _workers(os.getpid()) if threads > 1 else None
    if workers is None:
        arguments["threads"] = ALONE
        function.ctypes(arguments.ctypes.data)
    else:
        workers.run(function, arguments, threads)
