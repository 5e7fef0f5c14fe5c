"""Scatter of vectors to pool rows, in Triton; can be captured in a CUDA graph."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(1024)


def write_rows(x: Tensor, pool: Tensor, rows: Tensor) -> None:
    """pool[rows[i]] = x[i], except for negative rows.

    x float32 `[batch, d]`, pool float32 `[pool_rows, d]`, rows int32 `[batch]`, without duplicates.
    Raises ValueError for other shapes, dtypes and strides.
    """
    expected = (
        ("x", x, (len(x), *pool.shape[1:]), torch.float32),
        ("pool", pool, (len(pool), x.shape[-1]), torch.float32),
        ("rows", rows, (len(x),), torch.int32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {[*shape]} of {dtype},"
                f" not {[*tensor.shape]} {tensor.stride()} of {tensor.dtype}"
            )
    if len(x):
        size = x.shape[1]
        grid = (len(x), triton.cdiv(size, BLOCK.value))
        _write_rows[grid](x, pool, rows, SIZE=size, num_warps=4)


@triton.jit
def _write_rows(
    x_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    SIZE: tl.constexpr,  # noqa: N803
) -> None:
    i = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i).to(tl.int64)
    known = place < tl.where(row >= 0, SIZE, 0)
    tl.store(pool_ptr + row * SIZE + place, tl.load(x_ptr + i * SIZE + place, known), known)
