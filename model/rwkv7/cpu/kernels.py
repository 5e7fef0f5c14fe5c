"""Compiled updates of tokens and states between a layer's products."""

import math
from typing import Any

import numpy as np
from numba import float32

from model.kernels.cpu.delta import delta_rule
from model.kernels.cpu.functions import exp, jit, jit_sum
from model.kernels.cpu.rows import norm

LOG_SLOWEST = -math.exp(-0.5)

SHORTEST = 1e-12
"""Lower bound of the norm that keys are divided by."""


@jit
def sigmoid(x: Any) -> Any:
    return float32(1.0) / (float32(1.0) + exp(-x))


@jit
def tanh_all(x: Any) -> None:
    """In place, of `[rows, numbers]`."""
    for r in range(len(x)):
        for j in range(x.shape[1]):
            x[r, j] = float32(1.0) - float32(2.0) / (float32(1.0) + exp(float32(2.0) * x[r, j]))


@jit
def sigmoid_all(x: Any) -> None:
    """In place, of `[rows, numbers]`."""
    for r in range(len(x)):
        for j in range(x.shape[1]):
            x[r, j] = sigmoid(x[r, j])


@jit
def square_all(x: Any, first: int, last: int) -> None:
    """max(x, 0)^2 in place, in some columns of `[rows, numbers]`."""
    for r in range(len(x)):
        for j in range(first, last):
            positive = max(x[r, j], float32(0.0))
            x[r, j] = positive * positive


@jit
def shifts(
    x: Any, gain: Any, offset: Any, eps: Any, owner: Any, starts: Any, index: Any, before: Any,
    shares: Any, u: Any, mixed: Any, tid: int, n: int,
) -> None:  # fmt: skip
    """u = norm(x), and mixed[i] = u + (previous token's u - u) * shares[i].

    x, u `[tokens, d]`, mixed `[inputs, tokens, d]`, shares `[inputs, d]`; owner `[tokens]`: the
    token's sequence; the value before a sequence's first token is before[index[sequence]].
    """
    tokens, d = x.shape
    first, last = tid * tokens // n, (tid + 1) * tokens // n
    kept = np.empty(d, np.float32)
    for t in range(first, last):
        norm(x[t], gain, offset, eps, u[t])
        if t == starts[owner[t]]:
            previous = before[index[owner[t]]]
        elif t == first:
            norm(x[t - 1], gain, offset, eps, kept)
            previous = kept
        else:
            previous = u[t - 1]
        now = u[t]
        for i in range(len(shares)):
            share, out = shares[i], mixed[i, t]
            for j in range(d):
                out[j] = now[j] + (previous[j] - now[j]) * share[j]


@jit_sum
def _bonus(r: Any, k: Any, r_k: Any) -> Any:
    total = float32(0.0)
    for j in range(len(r)):
        total += r[j] * k[j] * r_k[j]
    return total


@jit_sum
def _squares(x: Any) -> Any:
    total = float32(0.0)
    for j in range(len(x)):
        total += x[j] * x[j]
    return total


@jit
def time_mix(
    size: Any, s: Any, s_at: Any, r: Any, k: Any, v: Any, w: Any, rate: Any, gate: Any,
    k_k: Any, k_a: Any, r_k: Any, gain: Any, offset: Any, eps: Any, y: Any, space: Any,
) -> None:  # fmt: skip
    """One token of one head: all `[size]`, except for the state in s at offset s_at, and space `[2,
    size]`.

    r, k, v as projected; w, rate and gate as from their low-rank maps. k, w and rate are
    overwritten.
    """
    a, b = space[0], space[1]
    for j in range(size):
        w[j] = exp(float32(LOG_SLOWEST) * sigmoid(w[j]))
        a[j] = k[j] * k_k[j]
    inverse = float32(-1.0) / max(np.sqrt(_squares(a)), float32(SHORTEST))
    for j in range(size):
        share = sigmoid(rate[j])
        a[j] *= inverse
        b[j] = -a[j] * share
        k[j] *= float32(1.0) + (share - float32(1.0)) * k_a[j]
    delta_rule(size, s, s_at, r, w, k, v, a, b, y)
    norm(y, gain, offset, eps, y)
    bonus = _bonus(r, k, r_k)
    for i in range(size):
        y[i] = (y[i] + bonus * v[i]) * gate[i]
