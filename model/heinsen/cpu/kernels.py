"""Compiled updates of positions and states between a layer's products.

Functions with `tid` and `n` do the share of thread `tid` of `n`.
"""

from typing import Any

import numpy as np
from numba import float32, float64, int8, int32

from model.heinsen.attention import GRID
from model.heinsen.config import FASTEST_DECAY
from model.kernels.cpu.functions import (
    bits,
    exp,
    from_bits,
    jit,
    jit_sum,
    larger,
    log,
    log1p,
    prefetch,
)
from model.kernels.cpu.sums import ADDED, EXPONENT, FLOOR, KEPT, READ, ROUND, update

TINY = 1.1754944e-38
"""The smallest normal float32."""

LINE = 64
"""Bytes that come from memory together."""


@jit_sum
def _dot(a: Any, b: Any) -> Any:
    total = float32(0.0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@jit
def decay(rates: Any, m: Any) -> None:
    """Add log f to m, from a token's rates as in `Layer`: both `[d_k]`, of one head."""
    for j in range(len(m)):
        log_f = float32(FASTEST_DECAY) / (float32(1.0) + exp(-rates[j]))
        m[j] -= np.rint(log_f * float32(1 / GRID)) * float32(GRID)


@jit
def position(
    gates: Any, emb: Any, starts: Any, h: Any, index: Any, x: Any, tid: int, n: int
) -> None:
    """h = logaddexp(logsigmoid(a) + h, b) token by token, [a, b] = gates; x = emb + h.

    gates `[tokens, 2 * d]`, emb, x `[tokens, d]`; sequence i has the tokens from starts[i] to
    starts[i + 1], and its h is h[index[i]] of `[pool, d]`, float64, updated in place.
    """
    width = emb.shape[1]
    first, last = tid * width // n, (tid + 1) * width // n
    for i in range(len(index)):
        past = h[index[i]]
        for t in range(starts[i], starts[i + 1]):
            for j in range(first, last):
                a, b = gates[t, j], float64(gates[t, width + j])
                decayed = float64(min(a, float32(0.0)) - log1p(exp(-abs(a)))) + past[j]
                top = larger(decayed, b)
                after = top + float64(log1p(exp(float32(min(decayed, b) - top))))
                past[j] = after
                x[t, j] = emb[t, j] + float32(after)


@jit
def _unit(x: Any) -> Any:
    """1/256 ulp of x, the unit of `low`."""
    return from_bits(max(bits(x) & int32(EXPONENT), int32(FLOOR))) * float32(2.0**-31)


@jit
def _lost(before: Any, after: Any, added: Any) -> Any:
    """The rounding error of `after` = fl(before + added), in units of `after`."""
    inverse = from_bits(int32(0x7F000000) - max(bits(after) & int32(EXPONENT), int32(FLOOR)))
    lost = (added - (after - before)) * inverse * float32(2.0**31)
    whole = min(max(lost, float32(-127.0)), float32(127.0)) + float32(ROUND)
    return int8(bits(whole) & int32(0xFF))


@jit
def fetch(s: Any, s_low: Any) -> None:
    """Begin to read a head's sums `[d_k, d_v]`, which memory has, not a cache."""
    d_key, d_val = s.shape
    for j in range(d_key):
        for i in range(0, d_val, LINE // 4):
            prefetch(s[j, i:])
        for i in range(0, d_val, LINE):
            prefetch(s_low[j, i:])


@jit
def workspace(tokens: int, d_key: int, d_val: int) -> Any:
    """What `attend` needs for so many tokens at once: keys, vals and higher of `update`, and the
    denominators."""
    return (
        _aligned(3 * tokens * d_key).reshape((3, tokens, d_key)),
        _aligned(3 * tokens * d_val).reshape((3, tokens, d_val)),
        np.empty(tokens, np.bool_),
        np.empty(tokens, np.float32),
    )


@jit
def _aligned(numbers: int) -> Any:
    """An array of float32 that begins with a cache line: vectors across two take longer."""
    found = np.empty(numbers + LINE // 4, np.float32)
    first = -found.ctypes.data % LINE // 4
    return found[first : first + numbers]


@jit
def attend(
    head: int, start: int, end: int, p: Any, rates: Any, m: Any, z: Any, s: Any, z_low: Any,
    s_low: Any, n: Any, log_values: bool, decays: bool, y: Any, space: Any,
) -> None:  # fmt: skip
    """`heinsen.attention.step` for one head of one sequence: its tokens from start to end in order,
    as many at a time as `workspace` has space for.

    p `[tokens, heads * (2 * d_k + d_v)]`: q, k and v; rates `[tokens, heads * d_k]`, by which m
    decays first; y `[tokens, heads * d_v]`. The bits do not depend on how many are read together.
    """
    keys, vals, higher, below = space
    d_key, d_val = s.shape
    per_head = 2 * d_key + d_val
    for first in range(start, end, len(higher)):
        count = min(len(higher), end - first)
        for t in range(count):
            if decays:
                decay(rates[first + t, head * d_key : (head + 1) * d_key], m)
            higher[t], below[t] = _weigh(
                p[first + t, head * per_head : (head + 1) * per_head],
                m, z, z_low, n, log_values, decays, t, keys, vals,
                y[first + t, head * d_val : (head + 1) * d_val],
            )  # fmt: skip
        update(count, s, s_low, keys, vals, higher)
        for t in range(count):
            _divide(
                vals[READ, t], below[t], log_values,
                y[first + t, head * d_val : (head + 1) * d_val],
            )  # fmt: skip


@jit
def _weigh(
    p: Any, m: Any, z: Any, z_low: Any, n: Any, log_values: bool, decays: bool, t: int,
    keys: Any, vals: Any, top_values: Any,
) -> Any:  # fmt: skip
    """Add one token to m, z and n, and set its factors in keys and vals.

    Returns whether m or n rose, and the denominator. top_values `[d_v]` = n if log_values.
    """
    d_key, d_val = len(m), vals.shape[2]
    q, k, v = p[:d_key], p[d_key : 2 * d_key], p[2 * d_key :]
    kept, weight, e = keys[KEPT, t], keys[ADDED, t], keys[READ, t]
    kept_v, u = vals[KEPT, t], vals[ADDED, t]
    higher = False
    for j in range(d_key):
        old = m[j]
        if decays:
            fraction = old - np.floor(old)
            new = larger(old, np.ceil(k[j] - fraction) + fraction)
        else:
            new = larger(old, np.ceil(k[j]))
        higher |= new != old
        kept[j], weight[j] = exp(old - new), exp(k[j] - new)
        m[j] = new
    for j in range(d_key):
        before = z[j] * kept[j]
        added = float32(z_low[j]) * _unit(before) + weight[j]
        after = before + added
        z_low[j] = _lost(before, after, added)
        z[j] = after
    top = m.max()
    for j in range(d_key):
        e[j] = q[j] + (m[j] - top)
    top = e.max()
    for j in range(d_key):
        e[j] = exp(e[j] - top)
    for i in range(d_val):
        if log_values:
            old = n[i]
            new = larger(old, np.ceil(v[i]))
            higher |= new != old
            kept_v[i], u[i] = exp(old - new), exp(v[i] - new)
            n[i] = new
        else:
            kept_v[i], u[i] = float32(1.0), v[i]
    if log_values:
        top_values[:] = n
    return higher, larger(_dot(e, z), float32(TINY))


@jit
def _divide(above: Any, below: Any, log_values: bool, y: Any) -> None:
    """y = above / below `[d_v]`; its log plus y, which is n, if log_values."""
    for i in range(len(above)):
        if log_values:
            y[i] = log(larger(above[i], float32(TINY))) - log(below) + y[i]
        else:
            y[i] = above[i] / below
