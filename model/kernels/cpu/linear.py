"""Records of addresses that compiled code reads, and one linear map as a compiled call.

Numba compiles each call at its first use and keeps the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, float32, types

from model.kernels.cpu.arithmetic import Arithmetic
from model.kernels.cpu.functions import CACHE, FOREVER, SOURCE, count_up, jit, pointer, until
from model.kernels.cpu.products import BLOCK, product, together
from model.kernels.cpu.threads import THREADS

ADDRESS = COUNT = np.int64

WEIGHT = np.dtype([("numbers", ADDRESS), ("scale", ADDRESS), ("bias", ADDRESS)])
"""Of a `PackedLinear`; 0 for what there is not."""

PRODUCT = np.dtype(
    [
        ("threads", THREADS),
        *((name, COUNT) for name in ("rows", "num_inputs", "num_outputs")),
        ("weight", WEIGHT),
        ("x", ADDRESS),
        ("y", ADDRESS),
    ]
)
"""Arguments of `product_function`."""

THREAD_FUNCTION = types.void(types.voidptr)
"""What `run_on_threads` runs: it reads a record that has THREADS."""


@jit
def array(address: Any, shape: Any, dtype: Any) -> Any:
    """The array that stands at an address."""
    return carray(pointer(address), shape, dtype)


@jit
def weight(addresses: Any, num_inputs: Any, num_outputs: Any, numbers: Any) -> Any:
    """Weight, scale and bias, as `product` takes them, from a WEIGHT."""
    blocks = (num_outputs + BLOCK - 1) // BLOCK
    steps = (num_inputs + together(numbers) - 1) // together(numbers)
    return (
        array(addresses.numbers, (blocks, steps, BLOCK), numbers),
        array(addresses.scale, (num_outputs if addresses.scale else 0,), float32),
        array(addresses.bias, (num_outputs if addresses.bias else 0,), float32),
    )


@jit
def wait(threads: Any) -> None:
    """Until all threads have come here."""
    n = threads.threads
    if n > 1:
        until(threads.arrived, (count_up(threads.arrived) // n + 1) * n, FOREVER, threads.rest)


@jit
def _product(a: Any, numbers: Any) -> None:
    """y = x @ weight^T * scale + bias; every thread of the team runs it."""
    tid, n = a.threads.thread, a.threads.threads
    w, scale, bias = weight(a.weight, a.num_inputs, a.num_outputs, numbers)
    x, y = array(a.x, (a.rows, a.num_inputs), float32), array(a.y, (a.rows, a.num_outputs), float32)
    product(x, w, scale, bias, y, False, tid, n)


@functools.cache
def product_function(arithmetic: Arithmetic) -> Any:
    """`void f(PRODUCT *arguments)`"""
    numbers, source = arithmetic.numbers, SOURCE

    @cfunc(THREAD_FUNCTION, cache=CACHE)
    def run(arguments: Any) -> None:
        if source:
            _product(carray(arguments, (1,), PRODUCT)[0], numbers)

    return run
