"""Records of addresses that compiled code reads, and one linear map as a compiled call.

Numba compiles each call at first use and caches the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, float32, int64, types

from model.kernels.cpu.arithmetic import Arithmetic
from model.kernels.cpu.functions import CACHE, SOURCE, call, jit, pointer
from model.kernels.cpu.openmp import OPENMP
from model.kernels.cpu.products import BLOCK, product, together

ADDRESS = COUNT = np.int64

WEIGHT = np.dtype([("numbers", ADDRESS), ("scale", ADDRESS), ("bias", ADDRESS)])
"""Addresses of a `PackedLinear`; 0 if absent."""

PRODUCT = np.dtype(
    [
        ("openmp", OPENMP),
        *((name, COUNT) for name in ("rows", "num_inputs", "num_outputs")),
        ("weight", WEIGHT),
        ("x", ADDRESS),
        ("y", ADDRESS),
    ]
)
"""Arguments of `product_function`."""

THREAD_FUNCTION = types.void(types.voidptr)
"""Type of the functions for `run_on_threads`: they read a record whose first field is OPENMP."""


@jit
def array(address: Any, shape: Any, dtype: Any) -> Any:
    """The array at an address."""
    return carray(pointer(address), shape, dtype)


@jit
def weight(addresses: Any, num_inputs: Any, num_outputs: Any, numbers: Any) -> Any:
    """Weight, scale and bias for `product`, from a WEIGHT."""
    blocks = (num_outputs + BLOCK - 1) // BLOCK
    steps = (num_inputs + together(numbers) - 1) // together(numbers)
    return (
        array(addresses.numbers, (blocks, steps, BLOCK), numbers),
        array(addresses.scale, (num_outputs if addresses.scale else 0,), float32),
        array(addresses.bias, (num_outputs if addresses.bias else 0,), float32),
    )


@jit
def thread_index(openmp: Any) -> Any:
    """This thread's number, and the number of threads."""
    if openmp.barrier:
        return int64(call(openmp.thread)), int64(call(openmp.threads))
    return int64(0), int64(1)


@jit
def wait(openmp: Any) -> None:
    """Barrier of all OpenMP threads."""
    if openmp.barrier:
        call(openmp.barrier)


@jit
def _product(a: Any, numbers: Any) -> None:
    """y = x @ weight^T * scale + bias; runs on every OpenMP thread."""
    tid, n = thread_index(a.openmp)
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
