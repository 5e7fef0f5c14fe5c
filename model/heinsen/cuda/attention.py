"""Attention on rows of a state pool, in Triton.

`step`, `chunked` and `absorb` are those of `heinsen.attention`, in float32 and without gradients.
In addition to a state they take `rows`, int32 `[batch]` on the device: the row of the state's
tensors for each sequence, without duplicates; without `rows`, sequence i has row i. A negative row
is skipped: nothing is read or written, and its y is 0. Nothing here synchronises, so calls can be
captured in a CUDA graph.

A sequence's bits depend on its own tokens and state alone, and not on how its tokens are split into
calls at multiples of 64. The kernels therefore do not specialise on sizes, strides and addresses of
tokens: another variant might sum in another order. (Values in a tuple are always specialised on;
these are not.)
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.heinsen.attention import CHUNK, AttentionState
from model.heinsen.cuda.chunks import carry, read, sum_chunks
from model.heinsen.cuda.memory import (
    channels_of,
    load_low,
    load_state,
    load_token,
    row_of,
    store_low,
    store_state,
)
from model.heinsen.cuda.sums import read_token


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    rows: Tensor | None = None,
    log_f: Tensor | None = None,
) -> Tensor:
    """One token per sequence, updating `state` in place.

    q, k, log_f `[batch, heads, d_k]`, v `[batch, heads, d_v]`, contiguous in the last axis ->
    `[batch, heads, d_v]`. Raises ValueError for unsupported tensors.
    """
    _check(state)
    batch, heads, d_key = k.shape
    d_val = v.shape[2]
    y = q.new_empty((batch, heads, d_val))
    block_k, block_v = triton.next_power_of_2(d_key), triton.next_power_of_2(d_val)
    falls = (None, 0, 0) if log_f is None else _strided(log_f)
    _step[batch, heads](
        *_strided(q, k, v), *falls, _tensors(state), (state.z_low, state.s_low), rows, y,
        d_key=d_key, d_val=d_val, block_k=block_k, block_v=block_v,
        # 32 elements of s per thread: a 32 x 32 head is one warp, and no reduction crosses warps.
        num_warps=min(max(block_k * block_v // 1024, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return y


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    log_f: Tensor | None = None,
) -> tuple[Tensor, AttentionState]:
    """Many tokens at once; chunks too steep for float32 are processed token by token.

    q, k, log_f `[batch, tokens, heads, d_k]`, v `[batch, tokens, heads, d_v]`, contiguous in the
    last axis -> y `[batch, tokens, heads, d_v]` and the state after the last token: with `rows`,
    `state` itself, updated in place, else a new one. `lengths`, int32 `[batch]` on the device:
    tokens beyond are padding, whose y is 0. Memory is linear in the number of tokens. Raises
    ValueError for unsupported tensors.
    """
    falls = None
    if log_f is not None:
        fallen, falls = _fall(log_f, lengths)
        q, k = q + fallen, k - fallen
    strided = _strided(q, k, v)
    before, state = _sum(k, v, state, rows, lengths, falls, keep=True)
    batch, tokens, heads, d_key = k.shape
    d_val = v.shape[3]
    y = q.new_empty((batch, tokens, heads, d_val))
    block_k, block_v = _block(d_key), _block(d_val)
    read[triton.cdiv(tokens, CHUNK), heads, batch](
        *strided, _tensors(before), rows, lengths, y, tokens,
        d_key=d_key, d_val=d_val, block_k=block_k, block_v=block_v,
        num_warps=8, num_stages=1,  # with 4 warps the matmul operands spill registers
    )  # fmt: skip
    return y, state


def absorb(
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    log_f: Tensor | None = None,
) -> AttentionState:
    """The state after all tokens of k and v, as by `chunked`, without outputs."""
    falls = None
    if log_f is not None:
        fallen, falls = _fall(log_f, lengths)
        k = k - fallen
    return _sum(k, v, state, rows, lengths, falls, keep=False)[1]


def _fall(log_f: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """D of each token `[batch, tokens, heads, d_k]`, and at each chunk's end `[batch, heads,
    chunks, d_k]`: sums of few multiples of `GRID`, so that any order gives the same bits."""
    batch, tokens, heads, d_key = log_f.shape
    if lengths is not None:
        padding = torch.arange(tokens, device=log_f.device) >= lengths.unsqueeze(1)
        log_f = log_f.masked_fill(padding[..., None, None], 0.0)
    chunks = triton.cdiv(tokens, CHUNK)
    whole = F.pad(log_f, (0, 0, 0, 0, 0, chunks * CHUNK - tokens))
    fallen = whole.reshape(batch, chunks, CHUNK, heads, d_key).cumsum(2)
    return fallen.flatten(1, 2)[:, :tokens], fallen[:, :, -1].transpose(1, 2).contiguous()


def _sum(
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    rows: Tensor | None,
    lengths: Tensor | None,
    falls: Tensor | None,
    keep: bool,
) -> tuple[AttentionState, AttentionState]:
    """Each chunk's own sums, or with `keep` the state before each chunk; and the end state.

    The chunks' tensors are `[batch, heads, chunks, ...]`, each relative to its own references.
    """
    if rows is None:
        state = state.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    _check(state)
    batch, tokens, heads, d_key = k.shape
    d_val, chunks = v.shape[3], triton.cdiv(tokens, CHUNK)
    shape = (batch, heads, chunks)
    sums = AttentionState(
        m=k.new_empty((*shape, d_key)),
        z=k.new_empty((*shape, d_key)),
        s=k.new_empty((*shape, d_key, d_val)),
        n=None if state.n is None else k.new_empty((*shape, d_val)),
    )
    block_k, block_v = _block(d_key), _block(d_val)
    num_warps = 4 if block_k * block_v <= 1024 else 8
    sum_chunks[chunks, heads, batch](
        *_strided(k, v), _tensors(sums), rows, lengths, tokens,
        d_key=d_key, d_val=d_val, block_k=block_k, block_v=block_v,
        num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    carry[heads, batch](
        _tensors(sums), _tensors(state), (state.z_low, state.s_low), falls, rows, lengths, tokens,
        keep=keep, d_key=d_key, d_val=d_val, block_k=block_k, block_v=block_v,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return sums, state


def _check(state: AttentionState) -> None:
    """Raises ValueError for unsupported tensors."""
    sums = [x for x in _tensors(state) if x is not None]
    lows = [x for x in (state.z_low, state.s_low) if x is not None]
    if any(x.dtype != torch.float32 for x in sums) or any(x.dtype != torch.int8 for x in lows):
        raise ValueError("the kernels need float32 states with int8 compensation terms")
    if len(lows) == 1:
        raise ValueError("a state needs both z_low and s_low, or neither")
    if not all(x.is_contiguous() for x in sums + lows):
        raise ValueError("the kernels need contiguous state tensors")


def _tensors(state: AttentionState) -> tuple[Tensor | None, ...]:
    return state.m, state.z, state.s, state.n


def _strided(*tokens: Tensor) -> list[Any]:
    """Tensors, each followed by its strides but the last, which is 1."""
    if any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in tokens):
        raise ValueError("the kernels need float32 tokens, contiguous in the last axis")
    return [part for x in tokens for part in (x, *x.stride()[:-1])]


def _block(size: int) -> int:
    """Block size for d channels in a matrix product."""
    return max(int(triton.next_power_of_2(size)), 16)


@triton.jit(
    do_not_specialize=[
        "q_row",
        "q_head",
        "k_row",
        "k_head",
        "v_row",
        "v_head",
        "f_row",
        "f_head",
    ],
    do_not_specialize_on_alignment=["q", "k", "v", "log_f", "rows"],
)
def _step(
    q: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    log_f: tl.tensor,
    f_row: tl.tensor,
    f_head: tl.tensor,
    state: tl.tuple,
    low: tl.tuple,
    rows: tl.tensor,
    y: tl.tensor,
    d_key: tl.constexpr,
    d_val: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """One program per head of a sequence: grid `[batch, heads]`."""
    log_values: tl.constexpr = state[3] is not None
    compensated: tl.constexpr = low[0] is not None
    sequence, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = row_of(rows, sequence)
    sequence = sequence.to(tl.int64)
    channels = channels_of(d_key, d_val, block_k, block_v)
    keys, vals, _, is_key, is_val, _ = channels
    y += (sequence * heads + head) * d_val + vals
    if row < 0:
        tl.store(y, tl.zeros([block_v], tl.float32), is_val)
        return
    place = row * heads + head
    qt, kt, vt = load_token(
        q + sequence * q_row + head * q_head,
        k + sequence * k_row + head * k_head,
        v + sequence * v_row + head * v_head,
        channels,
        log_values,
    )
    mt, zt, st, nt = load_state(state, place, channels, d_key, d_val)
    zt_low, st_low = load_low(low, place, channels, d_key, d_val)
    if log_f is not None:
        mt += tl.load(log_f + sequence * f_row + head * f_head + keys, is_key, other=0.0)
    yt, mt, zt, st, nt, zt_low, st_low = read_token(
        qt, kt, vt, mt, zt, st, nt, zt_low, st_low, log_values, compensated
    )
    tl.debug_barrier()  # another thread may not have loaded yet what this one overwrites
    store_state(state, place, (mt, zt, st, nt), channels, d_key, d_val)
    store_low(low, place, (zt_low, st_low), channels, d_key, d_val)
    tl.store(y, yt, is_val)
