"""Threads that run a compiled function together."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import carray, cfunc, int64

from model.kernels.cpu import workers
from model.kernels.cpu.linear import ADDRESS, THREAD_FUNCTION, array, wait
from model.kernels.cpu.threads import THREADS
from model.kernels.cpu.workers import run_on_threads

NUM_STEPS = 100

JOB = np.dtype([("threads", THREADS), ("numbers", ADDRESS)])


@pytest.fixture(scope="module")
def sums() -> Any:
    """Each thread writes a number, waits, and adds what the others wrote to its own sum."""

    @cfunc(THREAD_FUNCTION)
    def run(arguments: Any) -> None:
        job = carray(arguments, (1,), JOB)[0]
        tid, n = job.threads.thread, job.threads.threads
        numbers = array(job.numbers, (2, n), int64)
        for step in range(NUM_STEPS):
            numbers[0, tid] = step + tid
            wait(job.threads)
            for i in range(n):
                numbers[1, tid] += numbers[0, i]
            wait(job.threads)

    return run


def run(function: Any, threads: int) -> list[int]:
    numbers = np.zeros((2, threads), np.int64)
    job = np.zeros((), JOB)
    job["numbers"] = numbers.ctypes.data
    run_on_threads(function, job, threads)
    return numbers[1].tolist()


def expected(threads: int) -> list[int]:
    total = sum(step + tid for step in range(NUM_STEPS) for tid in range(threads))
    return [total] * threads


@pytest.mark.parametrize("threads", [1, 2, 5, 3])
def test_threads_see_what_others_wrote_before_a_barrier(sums: Any, threads: int) -> None:
    assert run(sums, threads) == expected(threads)


def test_threads_that_sleep_are_woken_up(sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = workers.Workers(workers._rest(), patience=1)
    monkeypatch.setattr(workers, "_workers", lambda _process: found)
    for _ in range(20):
        assert run(sums, 3) == expected(3)
        until = time.monotonic() + 60
        while not all(worker.is_asleep for worker in found.threads):
            assert time.monotonic() < until
            time.sleep(0.001)


def test_several_callers_have_them_in_turn(sums: Any) -> None:
    found = list[list[int]]()

    def call() -> None:
        for _ in range(10):
            found.append(run(sums, 3))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected(3)] * 40
