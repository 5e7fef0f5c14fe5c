"""Row operations between a layer's products: norms, mixtures, gates.

Functions with `tid` and `n` do the share of thread `tid` of `n`.
"""

from typing import Any

import numpy as np
from numba import float32

from model.kernels.cpu.functions import exp, jit, jit_sum


@jit_sum
def _mean(x: Any) -> Any:
    total = float32(0.0)
    for j in range(len(x)):
        total += x[j]
    return total / float32(len(x))


@jit_sum
def _variance(x: Any, mean: Any) -> Any:
    total = float32(0.0)
    for j in range(len(x)):
        total += (x[j] - mean) * (x[j] - mean)
    return total / float32(len(x))


@jit
def layer_norm(x: Any, weight: Any, bias: Any, y: Any, tid: int, n: int) -> None:
    """y = (x - mean) / sqrt(variance + 1e-5) * weight + bias; x, y `[rows, d]`."""
    for r in range(tid, len(x), n):
        norm(x[r], weight, bias, float32(1e-5), y[r])


@jit
def norm(x: Any, weight: Any, bias: Any, eps: Any, y: Any) -> None:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; x and y `[d]` may be the same."""
    mean = _mean(x)
    inverse = float32(1.0) / np.sqrt(_variance(x, mean) + eps)
    for j in range(len(x)):
        y[j] = (x[j] - mean) * inverse * weight[j] + bias[j]


@jit
def glu(x: Any, y: Any, tid: int, n: int) -> None:
    """y `[rows, d]` = x[:, :d] * sigmoid(x[:, d:])."""
    rows, width = y.shape
    first, last = tid * width // n, (tid + 1) * width // n
    for r in range(rows):
        for j in range(first, last):
            y[r, j] = x[r, j] / (float32(1.0) + exp(-x[r, width + j]))


@jit
def mix(p: Any, share: Any, before: Any) -> None:
    """p += share * (before - p), and `before` is set to the old p; all `[numbers]`."""
    for j in range(len(p)):
        now = p[j]
        p[j] = now + share[j] * (before[j] - now)
        before[j] = now


@jit
def gate(y: Any, x: Any) -> None:
    """y *= silu(x), both `[numbers]`."""
    for j in range(len(y)):
        y[j] *= x[j] / (float32(1.0) + exp(-x[j]))
