"""What happens to positions and states between the products of a layer.

Every function that takes `tid` and `n` does the share of thread `tid` of `n`.
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

TINY = 1.1754944e-38
"""The smallest normal float32."""

LINE = 64
"""Bytes that come from memory together."""

EXPONENT, FLOOR = 0x7F800000, 0x10000000
"""Bits of a float32's exponent; those of 2^-95, below which no correction is kept."""


@jit_sum
def _dot(a: Any, b: Any) -> Any:
    total = float32(0.0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@jit
def decay(rates: Any, m: Any) -> None:
    """m gains log f, as `Layer` makes it of a token's rates: both `[d_k]`, of one head."""
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
    """The 256th part of the last place of x: what `low` counts."""
    return from_bits(max(bits(x) & int32(EXPONENT), int32(FLOOR))) * float32(2.0**-31)


@jit
def _lost(before: Any, after: Any, added: Any) -> Any:
    """What `after` = fl(before + added) lacks, in units of `after`."""
    inverse = from_bits(int32(0x7F000000) - max(bits(after) & int32(EXPONENT), int32(FLOOR)))
    lost = (added - (after - before)) * inverse * float32(2.0**31)
    # Added to 1.5 * 2^23, a number is rounded to a whole one, which is then the lowest bits.
    whole = min(max(lost, float32(-127.0)), float32(127.0)) + float32(12582912.0)
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
def attend(
    q: Any, k: Any, v: Any, m: Any, z: Any, s: Any, z_low: Any, s_low: Any, n: Any,
    log_values: bool, decays: bool, y: Any, keys: Any, vals: Any,
) -> None:  # fmt: skip
    """`heinsen.attention.step` for one head of one sequence; keys `[3, d_k]`, vals `[3, d_v]`.

    The last two are room for what is computed on the way.
    """
    kept, weight, e = keys[0], keys[1], keys[2]
    kept_v, u, total = vals[0], vals[1], vals[2]
    d_key, d_val = len(q), len(v)
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
        total[i] = float32(0.0)
        if log_values:
            old = n[i]
            new = larger(old, np.ceil(v[i]))
            higher |= new != old
            kept_v[i], u[i] = exp(old - new), exp(v[i] - new)
            n[i] = new
        else:
            kept_v[i], u[i] = float32(1.0), v[i]
    if higher:
        for j in range(d_key):
            kept_j, row = kept[j], s[j]
            for i in range(d_val):
                row[i] *= kept_j * kept_v[i]
    for j in range(d_key):
        weight_j, e_j, row, row_low = weight[j], e[j], s[j], s_low[j]
        for i in range(d_val):
            before = row[i]
            added = float32(row_low[i]) * _unit(before) + weight_j * u[i]
            after = before + added
            row_low[i] = _lost(before, after, added)
            row[i] = after
            total[i] += e_j * after
    below = larger(_dot(e, z), float32(TINY))
    for i in range(d_val):
        if log_values:
            above = larger(total[i], float32(TINY))
            y[i] = log(above) - log(below) + n[i]
        else:
            y[i] = total[i] / below
