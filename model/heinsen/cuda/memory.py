"""Loads and stores of attention kernels: pool rows, heads, channels, tokens.

Kernels get a state's tensors as a tuple (m, z, s, n) and the compensation terms as (z_low, s_low).
n is None with linear values; z_low and s_low are None without compensation. A head is loaded in
blocks whose sizes are powers of two; `channels`, from `channels_of`, has their offsets and masks.
"""

from typing import Any

import triton
import triton.language as tl

from model.heinsen.cuda.sums import EMPTY


@triton.jit
def channels_of(
    d_key: tl.constexpr, d_val: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr
) -> Any:
    """Offsets and masks of a head's channels in k, v and s."""
    keys, vals = tl.arange(0, block_k), tl.arange(0, block_v)
    is_key, is_val = keys < d_key, vals < d_val
    both = keys[:, None] * d_val + vals[None, :]
    return keys, vals, both, is_key, is_val, is_key[:, None] & is_val[None, :]


@triton.jit
def load_state(
    state: tl.tuple,
    place: tl.tensor,
    channels: tl.tuple,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
) -> Any:
    """The state at one index of tensors `[places, ...]`; with linear values n is a dummy."""
    m, z, s, n = state
    keys, vals, both, is_key, is_val, are_both = channels
    at = place * d_key + keys
    m_here = tl.load(m + at, is_key, other=EMPTY)
    z_here = tl.load(z + at, is_key, other=0.0)
    s_here = tl.load(s + place * (d_key * d_val) + both, are_both, other=0.0)
    if n is not None:
        n_here = tl.load(n + place * d_val + vals, is_val, other=EMPTY)
    else:
        n_here = vals.to(tl.float32)
    return m_here, z_here, s_here, n_here


@triton.jit
def store_state(
    state: tl.tuple,
    place: tl.tensor,
    here: tl.tuple,
    channels: tl.tuple,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
) -> None:
    """The inverse of `load_state`."""
    m, z, s, n = state
    m_here, z_here, s_here, n_here = here
    keys, vals, both, is_key, is_val, are_both = channels
    at = place * d_key + keys
    tl.store(m + at, m_here, is_key)
    tl.store(z + at, z_here, is_key)
    tl.store(s + place * (d_key * d_val) + both, s_here, are_both)
    if n is not None:
        tl.store(n + place * d_val + vals, n_here, is_val)


@triton.jit
def load_low(
    low: tl.tuple, place: tl.tensor, channels: tl.tuple, d_key: tl.constexpr, d_val: tl.constexpr
) -> Any:
    """The compensation terms at one index; dummies if there are none."""
    z_low, s_low = low
    keys, _, both, is_key, _, are_both = channels
    if z_low is not None:
        z_here = tl.load(z_low + place * d_key + keys, is_key, other=0)
        s_here = tl.load(s_low + place * (d_key * d_val) + both, are_both, other=0)
    else:
        z_here, s_here = keys.to(tl.int8), both.to(tl.int8)
    return z_here, s_here


@triton.jit
def store_low(
    low: tl.tuple,
    place: tl.tensor,
    here: tl.tuple,
    channels: tl.tuple,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
) -> None:
    """The inverse of `load_low`."""
    z_low, s_low = low
    z_here, s_here = here
    keys, _, both, is_key, _, are_both = channels
    if z_low is not None:
        tl.store(z_low + place * d_key + keys, z_here, is_key)
        tl.store(s_low + place * (d_key * d_val) + both, s_here, are_both)


@triton.jit
def row_of(rows: tl.tensor, sequence: tl.tensor) -> Any:
    """The sequence's row of the state's tensors; negative for none."""
    row = sequence
    if rows is not None:
        row = tl.load(rows + sequence)
    return row.to(tl.int64)


@triton.jit
def length_of(lengths: tl.tensor, sequence: tl.tensor, tokens: tl.tensor) -> Any:
    """Number of the sequence's tokens without padding."""
    length = tokens
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + sequence), tokens)
    return length


@triton.jit
def load_token(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, channels: tl.tuple, log_values: tl.constexpr
) -> Any:
    """One token of one head."""
    keys, vals, _, is_key, is_val, _ = channels
    no_value: tl.constexpr = -float("inf") if log_values else 0.0
    qt = tl.load(q + keys, is_key, other=-float("inf"))
    kt = tl.load(k + keys, is_key, other=-float("inf"))
    vt = tl.load(v + vals, is_val, other=no_value)
    return qt, kt, vt


@triton.jit
def load_tokens(
    x: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    num_left: tl.tensor,
    pad: tl.constexpr,
    d: tl.constexpr,
    size: tl.constexpr,
) -> Any:
    """`size` tokens of one head from x on; `pad` outside the valid tokens and channels."""
    token = tl.arange(0, size)
    there = (token < num_left)[:, None] & (columns < d)[None, :]
    return tl.load(x + token[:, None] * stride + columns[None, :], there, other=pad)
