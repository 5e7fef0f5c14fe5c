"""Runs compiled functions on torch's own OpenMP threads.

A second pool of threads would fight with torch's for the cores: both spin while they wait. So the
runtime that torch has loaded is asked to start the team; where it cannot be found, and for one
thread, the caller's thread works alone.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TEAM = np.dtype([(name, np.int64) for name in ("thread", "threads", "barrier")])
"""Addresses of C functions `int f(void)`, by which a thread learns its number and the number of
threads, and waits for the others; all 0 if it is alone."""


@functools.cache
def _openmp() -> "tuple[Any, tuple[int, int, int]] | None":
    """The function that runs a team, and the addresses of those that its threads call."""
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


def run_team(function: Any, arguments: NDArray[np.void]) -> None:
    """Run a compiled function on a record, on as many threads as torch uses; sets its `team`."""
    num_threads, openmp = torch.get_num_threads(), _openmp()
    if num_threads == 1 or openmp is None:
        arguments["team"] = (0, 0, 0)
        function.ctypes(arguments.ctypes.data)
    else:
        run, inside = openmp
        arguments["team"] = inside
        run(function.address, arguments.ctypes.data, num_threads, 0)
