"""Runs compiled functions on torch's own OpenMP threads.

A second thread pool would compete with torch's for the cores, since both spin while they wait. The
OpenMP runtime loaded by torch therefore runs the threads; if it cannot be found, and for one
thread, the function runs on the caller's thread.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

OPENMP = np.dtype([(name, np.int64) for name in ("thread", "threads", "barrier")])
"""Addresses of C functions `int f(void)` for the thread's number, the number of threads, and the
barrier; all 0 on a single thread."""

WORTH_A_THREAD = 32 << 20
"""Multiply-adds per row of logits that justify another thread. With fewer, waking it costs more
than it gains: it would run a thousand times a second, next to the event loop, which then has that
many tokens to send."""


def num_threads(products: int, answers: int) -> int:
    """Threads for a step of this many multiply-adds and rows of logits, determined by the step's
    size, never by measured times. At most as many as torch uses."""
    return min(torch.get_num_threads(), 1 + products // max(1, answers) // WORTH_A_THREAD)


@functools.cache
def _openmp() -> "tuple[Any, tuple[int, int, int]] | None":
    """The function that runs OpenMP threads, and the addresses that its threads call."""
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu.*")):
        try:
            loaded = ctypes.CDLL(str(library))
            run = loaded.GOMP_parallel
            inside = (loaded.omp_get_thread_num, loaded.omp_get_num_threads, loaded.GOMP_barrier)
        except (OSError, AttributeError):
            continue
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        thread, threads, barrier = (
            ctypes.cast(function, ctypes.c_void_p).value or 0 for function in inside
        )
        return run, (thread, threads, barrier)
    return None


def run_on_threads(function: Any, arguments: NDArray[np.void], threads: int) -> None:
    """Run a compiled function on a record, on this many threads; sets its `openmp`."""
    openmp = _openmp()
    if threads == 1 or openmp is None:
        arguments["openmp"] = (0, 0, 0)
        function.ctypes(arguments.ctypes.data)
    else:
        run, inside = openmp
        arguments["openmp"] = inside
        run(function.address, arguments.ctypes.data, threads, 0)
