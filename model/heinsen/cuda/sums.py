"""Sums relative to running maxima in Triton, shared by all attention kernels.

Names follow the glossary of `heinsen.attention`. Channels beyond d_k and d_v, up to the block size,
hold -inf in q, k and log v, EMPTY in m and n, 0 in v and in sums: they contribute nothing.
"""

from typing import Any

import triton
import triton.language as tl

from model.heinsen import attention

EMPTY = tl.constexpr(attention.EMPTY)
TINY = tl.constexpr(2.0**-126)
"""The smallest normal float32."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
"""log 2 in two parts; the first has few enough digits that its product with an exponent is
exact."""

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits."""

EXPONENT, FLOOR = tl.constexpr(0x7F800000), tl.constexpr(0x10000000)
"""Exponent bits of a float32; those of 2^-95, below which there is no compensation."""


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> Any:
    """The maximum, NaN if either is NaN, so that errors stay visible."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def raised(m: tl.tensor, k: tl.tensor) -> Any:
    """The smallest m + integer that is at least m and k; `model.heinsen.attention._raised`."""
    below = tl.floor(m)
    return larger(m, tl.ceil(k - (m - below)) - (below - m))


@triton.jit
def exp(x: tl.tensor) -> Any:
    """exp(x) for x <= 0, to 2 or 3 ulp for any |x|; 0 below -87.

    `tl.exp` multiplies x by log2(e) in float32, which loses precision in proportion to |x|.
    """
    within = larger(x, -87.0)
    rounded = within * LOG2_E + ROUND
    power = rounded - ROUND
    rest = within - power * LN2_HIGH - power * LN2_LOW
    scale = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.exp2(rest * LOG2_E) * scale)


@triton.jit
def _exponent(x: tl.tensor) -> Any:
    """Bits of the largest power of two up to |x|, for |x| above 2^-95."""
    return tl.maximum(x.to(tl.int32, bitcast=True) & EXPONENT, FLOOR)


@triton.jit
def add(before: tl.tensor, added: tl.tensor, low: tl.tensor, compensated: tl.constexpr) -> Any:
    """The compensated sum of `model.heinsen.attention._add`: the rounded sum and its compensation.

    Only correct in kernels compiled without FMA contraction: `before` and `after` must be the
    rounded numbers that are stored. Without `compensated`, `low` is returned unchanged.
    """
    if compensated:
        unit = _exponent(before).to(tl.float32, bitcast=True) * 2.0**-31
        added += low.to(tl.float32) * unit
    after = before + added
    if compensated:
        # Subtracting an exponent's bits from these gives the inverse power of two.
        inverse = (0x7F000000 - _exponent(after)).to(tl.float32, bitcast=True)
        lost = (added - (after - before)) * inverse * 2.0**31
        whole = tl.minimum(tl.maximum(lost, -127.0), 127.0) + ROUND
        low = (whole.to(tl.int32, bitcast=True) & 0xFF).to(tl.int8)
    return after, low


@triton.jit
def ratio(
    numerator: tl.tensor, denominator: tl.tensor, n: tl.tensor, log_values: tl.constexpr
) -> Any:
    """y, or log y with log values; `model.heinsen.attention._ratio`."""
    denominator = larger(denominator, TINY)
    if log_values:
        y = tl.log(larger(numerator, TINY)) - tl.log(denominator) + n
    else:
        y = tl.div_rn(numerator, denominator)
    return y


@triton.jit
def read_token(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    m: tl.tensor,
    z: tl.tensor,
    s: tl.tensor,
    n: tl.tensor,
    z_low: tl.tensor,
    s_low: tl.tensor,
    log_values: tl.constexpr,
    compensated: tl.constexpr,
) -> Any:
    """`heinsen.attention.step` for a head in registers: y, then m, z, s, n, z_low, s_low after it.

    q, k, m, z, z_low `[block_k]`, v, n, y `[block_v]`, s, s_low `[block_k, block_v]`. n is
    unchanged without log values, and so are z_low and s_low without `compensated`.
    """
    m_before = m
    m = raised(m_before, k)
    kept, weight = exp(m_before - m), exp(k - m)
    if log_values:
        n_before = n
        n = larger(n_before, tl.ceil(v))
        u = exp(v - n)
        kept_s = kept[:, None] * exp(n_before - n)[None, :]
    else:
        u = v
        kept_s = kept[:, None]
    z, z_low = add(z * kept, weight, z_low, compensated)
    s, s_low = add(s * kept_s, weight[:, None] * u[None, :], s_low, compensated)
    logits = q + (m - tl.max(m, 0))
    e = exp(logits - tl.max(logits, 0))
    y = ratio(tl.sum(e[:, None] * s, 0), tl.sum(e * z, 0), n, log_values)
    return y, m, z, s, n, z_low, s_low
