"""Drawing tokens on a CPU, compiled."""

import functools
from typing import Any

import numpy as np
from numba import float32, float64, int32, njit

from model.kernels.cpu.functions import CACHE, SOURCE, bits, exp, from_bits, jit, jit_sum

PART = 1024
"""Tokens whose weights are summed by themselves."""


@jit
def _ordered(whole: Any) -> Any:
    """The bits of a float32 as a number in the order of the floats, and back."""
    return whole ^ ((whole >> int32(31)) & int32(0x7FFFFFFF))


@jit
def _largest(row: Any) -> Any:
    top = _ordered(bits(row[0]))
    for j in range(len(row)):
        top = max(top, _ordered(bits(row[j])))
    return from_bits(_ordered(top))


@jit_sum
def _total(weights: Any) -> Any:
    total = 0.0
    for j in range(len(weights)):
        total += float64(weights[j])
    return total


@jit
def _draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
    count = logits.shape[1]
    weights = np.empty(count, np.float32)
    sums = np.empty((count + PART - 1) // PART, np.float64)
    for r in range(len(logits)):
        row, top = logits[r], float64(_largest(logits[r]))
        for j in range(count):
            weights[j] = exp(float32((float64(row[j]) - top) / temperatures[r]))
        total = 0.0
        for part in range(len(sums)):
            sums[part] = _total(weights[part * PART : (part + 1) * PART])
            total += sums[part]
        if not 0.0 < total < np.inf:
            chosen[r] = -1
            continue
        target = min(points[r] * total, total * (1.0 - 2.0**-52))
        below, part = 0.0, 0
        while below + sums[part] <= target:
            below += sums[part]
            part += 1
        for j in range(part * PART, min((part + 1) * PART, count)):
            if weights[j] > float32(0.0):
                chosen[r] = j
                below += float64(weights[j])
                if below > target:
                    break


@functools.cache
def draw_function() -> Any:
    """`draw(logits, temperatures, points, chosen)`: the inverse of the distribution softmax(logits
    / t).

    logits `[rows, vocab]` float32, temperatures t above 0 and points from 0 to 1 `[rows]` float64;
    a token id for each row is written to chosen `[rows]` int64. Sums are float64. It is -1 where no
    token has a weight, or where one is NaN, which is so beside NaN and inf.
    """
    source = SOURCE

    @njit(cache=CACHE, nogil=True)
    def draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
        if source:
            _draw(logits, temperatures, points, chosen)

    return draw
