"""Attention over many tokens in Triton, as matrix products over chunks of 64 tokens.

`heinsen.attention.chunked` in three kernels: the sums of each chunk's own tokens; the state carried
from chunk to chunk; the outputs of each chunk from the state before it. Only the second is
sequential, with one sum per 64 tokens.

If keys decay, these kernels get k - D and q + D, relative to the start of each chunk.
"""

from typing import Any

import triton
import triton.language as tl

from model.heinsen import attention
from model.heinsen.cuda.memory import (
    channels_of,
    length_of,
    load_low,
    load_state,
    load_token,
    load_tokens,
    row_of,
    store_low,
    store_state,
)
from model.heinsen.cuda.sums import EMPTY, add, exp, larger, raised, ratio, read_token

CHUNK = tl.constexpr(attention.CHUNK)
SMALLEST = tl.constexpr(attention.SMALLEST)
PART = tl.constexpr(32)
"""Tokens per block whose matmul operands fit in registers."""


@triton.jit
def _reference(x: tl.tensor) -> Any:
    """Upper bound of the keys or log-values x `[64, channels]`, per channel."""
    return larger(tl.ceil(tl.max(x, 0)), EMPTY)


@triton.jit(
    do_not_specialize=["k_row", "k_token", "k_head", "v_row", "v_token", "v_head", "tokens"],
    do_not_specialize_on_alignment=["k", "v", "rows", "lengths"],
)
def sum_chunks(
    k: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    sums: tl.tuple,
    rows: tl.tensor,
    lengths: tl.tensor,
    tokens: tl.tensor,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """Sums over each chunk's own tokens, relative to their own maxima.

    Grid `[chunks, heads, batch]`; sums `[batch, heads, chunks, ...]`.
    """
    log_values: tl.constexpr = sums[3] is not None
    no_value: tl.constexpr = -float("inf") if log_values else 0.0
    chunk, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    first = chunk.to(tl.int64) * CHUNK
    row, num_left = row_of(rows, sequence), length_of(lengths, sequence, tokens) - first
    if (row < 0) | (num_left <= 0):
        return
    sequence = sequence.to(tl.int64)
    channels = channels_of(d_key, d_val, block_k, block_v)
    keys, vals, _, _, _, _ = channels
    k_first = k + sequence * k_row + first * k_token + head * k_head
    v_first = v + sequence * v_row + first * v_token + head * v_head
    m = _reference(load_tokens(k_first, k_token, keys, num_left, -float("inf"), d_key, CHUNK))
    if log_values:
        n = _reference(load_tokens(v_first, v_token, vals, num_left, no_value, d_val, CHUNK))
    else:
        n = vals.to(tl.float32)
    z = tl.zeros([block_k], tl.float32)
    s = tl.zeros([block_k, block_v], tl.float32)
    for part in range(0, CHUNK, PART):
        left = num_left - part
        a = load_tokens(k_first + part * k_token, k_token, keys, left, -float("inf"), d_key, PART)
        a = exp(a - m[None, :])
        u = load_tokens(v_first + part * v_token, v_token, vals, left, no_value, d_val, PART)
        if log_values:
            u = exp(u - n[None, :])
        z += tl.sum(a, 0)
        s = tl.dot(tl.trans(a), u, s, input_precision="ieee")
    place = (sequence * heads + head) * chunks + chunk
    store_state(sums, place, (m, z, s, n), channels, d_key, d_val)


@triton.jit(
    do_not_specialize=["tokens"], do_not_specialize_on_alignment=["falls", "rows", "lengths"]
)
def carry(
    sums: tl.tuple,
    state: tl.tuple,
    low: tl.tuple,
    falls: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    tokens: tl.tensor,
    keep: tl.constexpr,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """Add a head's chunks to its state in order; grid `[heads, batch]`.

    With `keep`, the chunk's sums are overwritten with the state before it, relative to its own
    references, so that nothing underflows. The next chunk's sums are prefetched.

    falls: D at the end of each chunk `[batch, heads, chunks, d_key]`, or None.
    """
    log_values: tl.constexpr = state[3] is not None
    compensated: tl.constexpr = low[0] is not None
    head, sequence, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    row = row_of(rows, sequence)
    chunks = tl.cdiv(tokens, CHUNK)
    num_read = tl.cdiv(length_of(lengths, sequence, tokens), CHUNK)
    if (row < 0) | (num_read <= 0):
        return
    place, first = row * heads + head, (sequence.to(tl.int64) * heads + head) * chunks
    channels = channels_of(d_key, d_val, block_k, block_v)
    m, z, s, n = load_state(state, place, channels, d_key, d_val)
    z_low, s_low = load_low(low, place, channels, d_key, d_val)
    m_next, z_next, s_next, n_next = load_state(sums, first, channels, d_key, d_val)
    chunk = 0
    while chunk < num_read:
        m_chunk, z_chunk, s_chunk, n_chunk = m_next, z_next, s_next, n_next
        following = first + tl.minimum(chunk + 1, num_read - 1)
        m_next, z_next, s_next, n_next = load_state(sums, following, channels, d_key, d_val)
        if keep:
            tl.debug_barrier()  # another thread may not have loaded yet what this one overwrites
            store_state(sums, first + chunk, (m, z, s, n), channels, d_key, d_val)
        m_before, n_before = m, n
        m = raised(m_before, m_chunk)
        kept, kept_chunk = exp(m_before - m), exp(m_chunk - m)
        kept_s, kept_s_chunk = kept[:, None], kept_chunk[:, None]
        if log_values:
            n = larger(n_before, n_chunk)
            kept_s = kept_s * exp(n_before - n)[None, :]
            kept_s_chunk = kept_s_chunk * exp(n_chunk - n)[None, :]
        z, z_low = add(z * kept, z_chunk * kept_chunk, z_low, compensated)
        s, s_low = add(s * kept_s, s_chunk * kept_s_chunk, s_low, compensated)
        if falls is not None:
            keys, _, _, is_key, _, _ = channels
            m += tl.load(falls + (first + chunk) * d_key + keys, is_key, other=0.0)
        chunk += 1
    tl.debug_barrier()
    store_state(state, place, (m, z, s, n), channels, d_key, d_val)
    store_low(low, place, (z_low, s_low), channels, d_key, d_val)


@triton.jit(
    do_not_specialize=[
        "q_row",
        "q_token",
        "q_head",
        "k_row",
        "k_token",
        "k_head",
        "v_row",
        "v_token",
        "v_head",
        "tokens",
    ],
    do_not_specialize_on_alignment=["q", "k", "v", "rows", "lengths"],
)
def read(
    q: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    before: tl.tuple,
    rows: tl.tensor,
    lengths: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """The outputs of a chunk from the state before it.

    Grid `[chunks, heads, batch]`; before `[batch, heads, chunks, ...]`.
    """
    log_values: tl.constexpr = before[3] is not None
    no_value: tl.constexpr = -float("inf") if log_values else 0.0
    chunk, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    first = chunk.to(tl.int64) * CHUNK
    row, num_left = row_of(rows, sequence), length_of(lengths, sequence, tokens) - first
    sequence = sequence.to(tl.int64)
    token, channels = tl.arange(0, CHUNK), channels_of(d_key, d_val, block_k, block_v)
    keys, vals, _, is_key, is_val, _ = channels
    y += ((sequence * tokens + first) * heads + head) * d_val
    at_y = y + token[:, None] * (heads * d_val) + vals[None, :]
    in_y = (token < tokens - first)[:, None] & is_val[None, :]
    if (row < 0) | (num_left <= 0):
        tl.store(at_y, tl.zeros([CHUNK, block_v], tl.float32), in_y)
        return
    q_first = q + sequence * q_row + first * q_token + head * q_head
    k_first = k + sequence * k_row + first * k_token + head * k_head
    v_first = v + sequence * v_row + first * v_token + head * v_head
    place = (sequence * heads + head) * chunks + chunk
    m_before, z_before, s_before, n_before = load_state(before, place, channels, d_key, d_val)

    all_k = load_tokens(k_first, k_token, keys, num_left, -float("inf"), d_key, CHUNK)
    is_token = tl.max(all_k, 1) > -float("inf")
    m = larger(m_before, _reference(all_k))
    kept = exp(m_before - m)
    kept_s = kept[:, None]
    n = n_before
    if log_values:
        all_v = load_tokens(v_first, v_token, vals, num_left, no_value, d_val, CHUNK)
        n = larger(n_before, _reference(all_v))
        kept_s = kept_s * exp(n_before - n)[None, :]
    top = tl.max(m, 0)
    logits = load_tokens(q_first, q_token, keys, num_left, 0.0, d_key, CHUNK) + (m - top)[None, :]
    logits = tl.where(is_key[None, :], logits, -float("inf"))
    e = exp(logits - tl.max(logits, 1)[:, None])
    denominator = tl.sum(e * (z_before * kept)[None, :], 1)
    numerator = tl.dot(e, s_before * kept_s, input_precision="ieee")
    for part in range(0, CHUNK, PART):
        left = num_left - part
        a = load_tokens(k_first + part * k_token, k_token, keys, left, -float("inf"), d_key, PART)
        weights = tl.dot(e, tl.trans(exp(a - m[None, :])), input_precision="ieee")
        past = token[:, None] >= part + tl.arange(0, PART)[None, :]
        weights = tl.where(past, weights, 0.0)
        u = load_tokens(v_first + part * v_token, v_token, vals, left, no_value, d_val, PART)
        if log_values:
            u = exp(u - n[None, :])
        denominator += tl.sum(weights, 1)
        numerator = tl.dot(weights, u, numerator, input_precision="ieee")

    smallest = denominator
    if log_values:
        of_values = tl.where(is_val[None, :], numerator, float("inf"))
        smallest = tl.minimum(smallest, tl.min(of_values, 1))
    enough = tl.where(top < EMPTY / 10, -1.0, SMALLEST)  # an empty state has nothing to lose
    if tl.min(tl.where(is_token, smallest, 1.0), 0) > enough:
        found = ratio(numerator, denominator[:, None], n[None, :], log_values)
        tl.store(at_y, tl.where((token < num_left)[:, None], found, 0.0), in_y)
    else:
        zeros = tl.zeros([CHUNK, block_v], tl.float32)
        tl.store(at_y, zeros, in_y & (token >= num_left)[:, None])
        m, z, s, n = m_before, z_before, s_before, n_before
        t = 0
        while t < tl.minimum(num_left, CHUNK):
            qt, kt, vt = load_token(
                q_first + t * q_token,
                k_first + t * k_token,
                v_first + t * v_token,
                channels,
                log_values,
            )
            yt, m, z, s, n, _no_z, _no_s = read_token(
                qt, kt, vt, m, z, s, n, z, s, log_values, False
            )
            tl.store(y + t * (heads * d_val) + vals, yt, is_val)
            t += 1
