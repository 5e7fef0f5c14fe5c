"""Compiled sampling on a CPU."""

import functools
from typing import Any

import numpy as np
from numba import float32, float64, njit

from model.kernels.cpu.functions import CACHE, SOURCE, exp, jit


@jit
def _draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
    weights = np.empty(logits.shape[1], np.float32)
    for r in range(len(logits)):
        row, top = logits[r], float64(logits[r].max())
        for j in range(len(row)):
            weights[j] = exp(float32((float64(row[j]) - top) / temperatures[r]))
        total = 0.0
        for j in range(len(row)):
            total += float64(weights[j])
        if not 0.0 < total < np.inf:
            chosen[r] = -1
            continue
        target = min(points[r] * total, total * (1.0 - 2.0**-52))
        below, j = float64(weights[0]), 0
        while below <= target:
            j += 1
            below += float64(weights[j])
        chosen[r] = j


@functools.cache
def draw_function() -> Any:
    """`draw(logits, temperatures, points, chosen)`: inverse transform sampling of softmax(logits /
    t).

    logits `[rows, vocab]` float32, temperatures t > 0 and points in [0, 1) `[rows]` float64; chosen
    `[rows]` int64 receives a token id per row. Sums are float64. The id is -1 for rows with NaN or
    inf, and where every weight is 0.
    """
    source = SOURCE

    @njit(cache=CACHE, nogil=True)
    def draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
        if source:
            _draw(logits, temperatures, points, chosen)

    return draw
