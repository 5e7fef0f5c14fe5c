"""`recurrence.recurrent` as a Triton kernel: states stay in registers for all tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.rwkv7.recurrence import Vectors

VALUES = 16
"""Value channels per program: each is an independent column of the state."""


@triton.jit
def _recurrent(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    s_ptr: tl.tensor,
    y_ptr: tl.tensor,
    after_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    keys: tl.constexpr,
    values: tl.constexpr,
) -> None:
    """Vectors `[batch, tokens, heads, n]`, states `[batch, heads, n, n]`; keys is at least n."""
    sequence_head = tl.program_id(0)
    sequence, head = sequence_head // heads, sequence_head % heads
    key, value = tl.arange(0, keys), tl.program_id(1) * values + tl.arange(0, values)
    is_key, is_value = key < n, value < n
    in_state = sequence_head.to(tl.int64) * n * n + key[:, None] * n + value[None, :]
    mask = is_key[:, None] & is_value[None, :]
    s = tl.load(s_ptr + in_state, mask, 0.0)
    at = (sequence.to(tl.int64) * tokens * heads + head) * n
    for _ in range(tokens):
        r, a = tl.load(r_ptr + at + key, is_key, 0.0), tl.load(a_ptr + at + key, is_key, 0.0)
        k, b = tl.load(k_ptr + at + key, is_key, 0.0), tl.load(b_ptr + at + key, is_key, 0.0)
        w = tl.exp(tl.load(w_ptr + at + key, is_key, 0.0))
        v = tl.load(v_ptr + at + value, is_value, 0.0)
        removed = tl.sum(s * a[:, None], 0)
        s = s * w[:, None] + b[:, None] * removed[None, :] + k[:, None] * v[None, :]
        tl.store(y_ptr + at + value, tl.sum(s * r[:, None], 0), is_value)
        at += heads * n
    tl.store(after_ptr + in_state, s, mask)


def fused(vectors: Vectors, s: Tensor) -> tuple[Tensor, Tensor]:
    """`recurrent`, in float32."""
    inputs = [x.float().contiguous() for x in vectors]
    s = s.float().contiguous()
    batch, tokens, heads, n = inputs[0].shape
    y, after = torch.empty_like(inputs[3]), torch.empty_like(s)
    grid = (batch * heads, triton.cdiv(n, VALUES))
    keys = triton.next_power_of_2(n)
    _recurrent[grid](*inputs, s, y, after, tokens, heads, n, keys, VALUES)
    return y, after
