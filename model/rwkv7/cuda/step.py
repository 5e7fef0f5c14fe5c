"""One token of each of many rows, in Triton: what is between the products of a layer.

Rows of a pool are read and written in place by their index; where that is negative, nothing is
read or written. Nothing here waits for the device, so every call can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.rwkv7.layers import LOG_SLOWEST, Norm, TimeMix

SLOWEST = tl.constexpr(LOG_SLOWEST)

SHORTEST = tl.constexpr(1e-12)
"""A key is not divided by less than this to have length 1."""


def embed(table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
    """norm(table[ids]) `[batch, d]`; a negative id stands for zeros. table float32 or bfloat16
    `[vocab, d]`, ids int32 `[batch]`."""
    x = torch.empty(len(ids), table.shape[1], device=table.device)
    if len(ids):
        d = x.shape[1]
        _embed[(len(ids),)](
            table, ids, norm.weight, norm.bias, norm.eps, x, d,
            BLOCK=triton.next_power_of_2(d), num_warps=8,
        )  # fmt: skip
    return x


def mix(x: Tensor, norm: Norm, shares: Tensor, before: Tensor, rows: Tensor) -> Tensor:
    """u + (before[rows] - u) * shares[i] `[inputs, batch, d]` of u = norm(x); before[rows] = u.

    x `[batch, d]`, shares `[inputs, d]`, before `[pool_rows, d]`, rows int32 `[batch]`, none twice.
    """
    count, d = x.shape
    mixed = x.new_empty(len(shares), count, d)
    if count:
        _mix[(count,)](
            x, norm.weight, norm.bias, norm.eps, before, rows, shares, mixed, count, d,
            INPUTS=len(shares), BLOCK=triton.next_power_of_2(d), num_warps=8,
        )  # fmt: skip
    return mixed


def time_mix(
    layer: TimeMix,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    firsts: tuple[Tensor, Tensor] | None,
    states: Tensor,
    rows: Tensor,
) -> Tensor:
    """The recurrence, the norm of each head, the bonus and the gate: what goes into `output`.

    vectors: r, w, k, v, rate, gate as their maps give them, `[batch, d]`. firsts: layer 0's value,
    and how much of it is the value here, before the sigmoid. states `[pool_rows, heads, keys,
    values]`.
    """
    count, heads, n = len(rows), states.shape[1], states.shape[2]
    y = torch.empty_like(vectors[0])
    if count:
        _time_mix[(count, heads)](
            *vectors, *(firsts or (None, None)), states, rows,
            layer.k_k, layer.k_a, layer.r_k, layer.norm.weight, layer.norm.bias, layer.norm.eps, y,
            heads, n, BLOCK=triton.next_power_of_2(n), num_warps=4,
        )  # fmt: skip
    return y


@triton.jit
def _normed(
    x: tl.tensor,
    known: tl.tensor,
    at: tl.tensor,
    gain_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    eps: tl.tensor,
    count: tl.tensor,
) -> tl.tensor:
    """LayerNorm of one vector."""
    centred = tl.where(known, x - tl.sum(x, 0) / count, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / count + eps)
    gain, offset = tl.load(gain_ptr + at, known, 0.0), tl.load(offset_ptr + at, known, 0.0)
    return centred * scale * gain + offset


@triton.jit
def _embed(
    table_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    eps: tl.tensor,
    x_ptr: tl.tensor,
    d: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    i, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = j < d
    token_id = tl.load(ids_ptr + i).to(tl.int64)
    there = j < tl.where(token_id >= 0, d, 0)
    x = tl.load(table_ptr + token_id * d + j, there, 0.0).to(tl.float32)
    tl.store(x_ptr + i * d + j, _normed(x, known, j, gain_ptr, offset_ptr, eps, d), known)


@triton.jit
def _mix(
    x_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    eps: tl.tensor,
    before_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    count: tl.tensor,
    d: tl.tensor,
    INPUTS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    i, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = j < d
    x = tl.load(x_ptr + i * d + j, known, 0.0)
    u = _normed(x, known, j, gain_ptr, offset_ptr, eps, d)
    row = tl.load(rows_ptr + i).to(tl.int64)
    there = j < tl.where(row >= 0, d, 0)
    before = tl.load(before_ptr + row * d + j, there, 0.0)
    tl.store(before_ptr + row * d + j, u, there)
    for n in tl.static_range(INPUTS):
        share = tl.load(shares_ptr + n * d + j, known, 0.0)
        tl.store(mixed_ptr + (n * count + i) * d + j, u + (before - u) * share, known)


@triton.jit
def _time_mix(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    v_first_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    k_k_ptr: tl.tensor,
    k_a_ptr: tl.tensor,
    r_k_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    eps: tl.tensor,
    y_ptr: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """One token of one head. Keys are the first axis of its state, values the second."""
    i, head, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    known, of_head = c < n, head * n + c
    at = i * heads * n + of_head
    r, k = tl.load(r_ptr + at, known, 0.0), tl.load(k_ptr + at, known, 0.0)
    decay = tl.exp(tl.sigmoid(tl.load(w_ptr + at, known, 0.0)) * SLOWEST)
    rate = tl.sigmoid(tl.load(rate_ptr + at, known, 0.0))
    key = k * tl.load(k_k_ptr + of_head, known, 0.0)
    key = key / tl.maximum(tl.sqrt(tl.sum(key * key, 0)), SHORTEST)
    k = k * (1.0 + (rate - 1.0) * tl.load(k_a_ptr + of_head, known, 0.0))
    v = tl.load(v_ptr + at, known, 0.0)
    if first_ptr is not None:
        share = tl.sigmoid(tl.load(first_ptr + at, known, 0.0))
        v += (tl.load(v_first_ptr + at, known, 0.0) - v) * share
    row = tl.load(rows_ptr + i).to(tl.int64)
    is_key = c < tl.where(row >= 0, n, 0)
    there = is_key[:, None] & known[None, :]
    in_state = states_ptr + ((row * heads + head) * n + c[:, None]) * n + c[None, :]
    s = tl.load(in_state, there, 0.0)
    removed = tl.sum(s * key[:, None], 0)
    s = s * decay[:, None] - (key * rate)[:, None] * removed[None, :] + k[:, None] * v[None, :]
    tl.store(in_state, s, there)
    y = _normed(tl.sum(s * r[:, None], 0), known, of_head, gain_ptr, offset_ptr, eps, n)
    bonus = tl.sum(r * k * tl.load(r_k_ptr + of_head, known, 0.0), 0)
    tl.store(y_ptr + at, (y + bonus * v) * tl.load(gate_ptr + at, known, 0.0), known)
