"""Linear maps in Triton, fused with the operations around them.

Only the weights are rounded: sums are float32, and where tensor cores multiply bfloat16 numbers, an
input is split in two, x = high + low, which keep at least 16 of its 24 bits. Nothing here
synchronises, so every call can be captured in a CUDA graph.

A row's bits do not depend on the values of other rows. All tiles sum along `in` in one order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NormWeights = tuple[Tensor, Tensor, float]
"""Weight and bias `[in]` and eps of a LayerNorm."""

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

PROCESSORS = 132
"""Multiprocessors of an H100 or H200: with fewer tiles some are idle."""

GROUP = tl.constexpr(16)
"""Tiles of one column computed before the next column: they share L2."""

NORM_BLOCK = tl.constexpr(256)
"""Columns per step of LayerNorm's sums; the same for every tile, so that the bits are, too."""

STATISTICS_ROWS = 4


@dataclass(frozen=True)
class Tile:
    """Tile shape of one program, its step along `in`, and its warps."""

    rows: int
    outputs: int
    """Rows of the weight: with GLU twice the outputs, but at least 16 pairs."""

    inputs: int
    num_warps: int
    num_stages: int


FEW_ROWS = 64
"""Up to this size each program computes LayerNorm's sums, beyond it a separate kernel."""

FEW = (Tile(16, 64, 64, 4, 6), Tile(16, 32, 64, 4, 6), Tile(16, 16, 64, 4, 6))
"""Weights are read once or a few times; deep pipelines hide the memory latency."""

MANY = (
    # Tile(128, 256, 64, 8, 3),  # inputs have 4 bytes, weights 2: wide tiles read fewer bytes
    Tile(128, 256, 64, 8, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 32, 64, 4, 5),
)

WHOLE_FEW = (Tile(16, 64, 32, 4, 4), Tile(16, 32, 32, 4, 4), Tile(16, 16, 32, 4, 4))
"""For float32 weights, which do not use tensor cores."""

WHOLE_MANY = (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(32, 32, 32, 4, 4))


def choose_tile(rows: int, weight_rows: int, *, whole: bool) -> Tile:
    """The largest tile that keeps all multiprocessors busy, else the smallest.

    `whole`: weights are float32.
    """
    few, many = (WHOLE_FEW, WHOLE_MANY) if whole else (FEW, MANY)
    tiles: tuple[Tile, ...] = few if rows <= FEW_ROWS else many
    for tile in tiles:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(weight_rows, tile.outputs) >= PROCESSORS:
            return tile
    return tiles[-1]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: NormWeights | None = None,
    glu: bool = False,
    residual: Tensor | None = None,
    ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`norm(x) @ weight.T * scale + bias`, then GLU, then `+ residual`: `[rows, out]`, written to
    `out` if given.

    x `[rows, in]` float32; weight `[out, in]` float32, bfloat16 or int8 with scale `[out]`
    (`narrow`); bias `[out]`; residual `[rows, out]`. With `glu`, weight, scale and bias have `2 *
    out` outputs, the second half being gates (`torch.nn.GLU`). With `ids` `[rows]`, int32 or int64,
    x is a table `[vocab, in]`, float32 or bfloat16, and ids select its rows; negative ids select
    zeros. Rows of x and residual may be strided.

    Raises ValueError for other shapes, dtypes and strides.
    """
    num_rows = len(x if ids is None else ids)
    weight_rows, num_in = weight.shape
    num_out = weight_rows // 2 if glu else weight_rows
    _check(x, weight, bias, scale, norm, glu, residual, ids)
    y = torch.empty(num_rows, num_out, device=x.device) if out is None else out
    if y.shape != (num_rows, num_out) or y.dtype != torch.float32 or not y.is_contiguous():
        raise ValueError(f"out must be contiguous float32 {[num_rows, num_out]}, not {[*y.shape]}")
    if not y.numel():
        return y
    tile = choose_tile(num_rows, weight_rows, whole=weight.dtype == torch.float32)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    statistics = None
    if norm is not None and num_rows > FEW_ROWS:
        statistics = torch.empty(num_rows, 2, device=x.device)
        _statistics[(triton.cdiv(num_rows, STATISTICS_ROWS),)](
            x, ids, statistics, num_rows, x.stride(0), eps,
            NUM_IN=num_in, BLOCK_M=STATISTICS_ROWS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    block_n = max(tile.outputs // 2, 16) if glu else tile.outputs
    _linear[(triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_out, block_n),)](
        x, ids, weight, scale, bias, statistics, norm_weight, norm_bias, residual, y,
        num_rows, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        NUM_IN=num_in, NUM_OUT=num_out, GLU=glu, SPLIT=weight.dtype != torch.float32,
        # The interpreter multiplies bfloat16 bits as integers.
        DOT=tl.bfloat16 if x.is_cuda else tl.float32,
        BLOCK_M=tile.rows, BLOCK_N=block_n, BLOCK_K=tile.inputs,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: NormWeights | None,
    glu: bool,
    residual: Tensor | None,
    ids: Tensor | None,
) -> None:
    weight_rows, num_in = weight.shape
    if weight.dtype not in WEIGHT_DTYPES or not weight.is_contiguous():
        raise ValueError(
            f"weights must be contiguous and one of {WEIGHT_DTYPES}, not {weight.dtype}"
        )
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError("int8 weights need a scale, other weights must not have one")
    if glu and weight_rows % 2:
        raise ValueError(f"GLU needs an even number of outputs, not {weight_rows}")
    if x.dim() != 2 or x.shape[1] != num_in or (num_in > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [rows, {num_in}] with stride 1, not {[*x.shape]} {x.stride()}")
    if x.dtype != torch.float32 and (ids is None or x.dtype != torch.bfloat16):
        raise ValueError(f"x must be float32, or a table of bfloat16, not {x.dtype}")
    if ids is not None and (ids.dim() != 1 or not ids.is_contiguous() or ids.is_floating_point()):
        raise ValueError("ids must be contiguous integers [rows]")
    vectors = [(bias, weight_rows), (scale, weight_rows)]
    vectors += [(part, num_in) for part in (norm or ())[:2] if isinstance(part, Tensor)]
    for vector, size in vectors:
        if vector is not None and (
            vector.shape != (size,) or vector.dtype != torch.float32 or not vector.is_contiguous()
        ):
            raise ValueError(f"bias, scale and norm must be contiguous float32, here [{size}]")
    if residual is not None:
        shape = (len(x if ids is None else ids), weight_rows // 2 if glu else weight_rows)
        if residual.shape != shape or residual.dtype != torch.float32:
            raise ValueError(f"the residual must be float32 {shape}, not {[*residual.shape]}")
        if shape[1] > 1 and residual.stride(1) != 1:
            raise ValueError(f"rows of the residual must have stride 1, not {residual.stride(1)}")


@triton.jit
def _find_rows(
    x_ptr: tl.tensor, ids_ptr: tl.tensor, m: tl.tensor, rows: tl.tensor, x_stride: tl.tensor
) -> tl.tensor:
    """Offsets of the rows m of x, and which of them exist."""
    valid = m < rows
    row = m.to(tl.int64)
    if ids_ptr is not None:
        row = tl.load(ids_ptr + m, valid, -1).to(tl.int64)
        valid &= row >= 0
    return x_ptr + row * x_stride, valid


@triton.jit
def _moments(
    x_rows: tl.tensor,
    valid: tl.tensor,
    eps: tl.tensor,
    NUM_IN: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """Mean and 1 / sqrt(variance + eps) of each row, from the deviations from the mean."""
    k = tl.arange(0, NORM_BLOCK)
    total = tl.zeros([BLOCK_M, NORM_BLOCK], tl.float32)
    for start in tl.static_range(0, NUM_IN, NORM_BLOCK):
        mask = valid[:, None] & (start + k < NUM_IN)[None, :]
        total += tl.load(x_rows[:, None] + (start + k)[None, :], mask, 0.0).to(tl.float32)
    mean = tl.sum(total, 1) / NUM_IN
    total = tl.zeros([BLOCK_M, NORM_BLOCK], tl.float32)
    for start in tl.static_range(0, NUM_IN, NORM_BLOCK):
        mask = valid[:, None] & (start + k < NUM_IN)[None, :]
        x = tl.load(x_rows[:, None] + (start + k)[None, :], mask, 0.0).to(tl.float32)
        apart = tl.where((start + k < NUM_IN)[None, :], x - mean[:, None], 0.0)
        total += apart * apart
    return mean, 1.0 / tl.sqrt_rn(tl.sum(total, 1) / NUM_IN + eps)


@triton.jit(do_not_specialize=["rows"])
def _statistics(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    NUM_IN: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
) -> None:
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows, valid = _find_rows(x_ptr, ids_ptr, m, rows, x_stride)
    mean, inverse = _moments(x_rows, valid, eps, NUM_IN, BLOCK_M)
    tl.store(statistics_ptr + 2 * m, mean, m < rows)
    tl.store(statistics_ptr + 2 * m + 1, inverse, m < rows)


@triton.jit
def _multiply(
    x: tl.tensor,
    weight_rows: tl.tensor,
    k: tl.tensor,
    mask: tl.tensor,
    sums: tl.tensor,
    SPLIT: tl.constexpr,  # noqa: N803
    DOT: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """`sums + x @ weight.T` for one block along `in`."""
    weight = tl.load(weight_rows[None, :] + k[:, None], mask, 0.0)
    if SPLIT:
        weight = weight.to(DOT)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(high.to(DOT), weight, sums)
        sums = tl.dot(low.to(DOT), weight, sums)
    else:
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    return sums


@triton.jit
def _finish(
    sums: tl.tensor, scale_ptr: tl.tensor, bias_ptr: tl.tensor, n: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + n, mask, 0.0)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask, 0.0)[None, :]
    return sums


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    NUM_IN: tl.constexpr,  # noqa: N803
    NUM_OUT: tl.constexpr,  # noqa: N803
    GLU: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
    DOT: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
) -> None:
    per_group = GROUP * tl.cdiv(NUM_OUT, BLOCK_N)
    first = tl.program_id(0) // per_group * GROUP
    within = tl.program_id(0) % per_group
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    top = ((first + within % height) * BLOCK_M).to(tl.int64)  # tokens times vocab exceed int32
    left = (within // height * BLOCK_N).to(tl.int64)
    down, right = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = top.to(tl.int32) + down, left.to(tl.int32) + right

    x_rows, valid = _find_rows(x_ptr, ids_ptr, m, rows, x_stride)
    if norm_weight_ptr is not None:
        if statistics_ptr is not None:
            mean = tl.load(statistics_ptr + 2 * m, m < rows, 0.0)
            inverse = tl.load(statistics_ptr + 2 * m + 1, m < rows, 0.0)
        else:
            mean, inverse = _moments(x_rows, valid, eps, NUM_IN, BLOCK_M)

    outputs = n < NUM_OUT
    weight_rows = weight_ptr + left * NUM_IN + right * NUM_IN
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GLU:
        gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gate_rows = weight_ptr + (left + NUM_OUT) * NUM_IN + right * NUM_IN
    for start in range(0, NUM_IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inputs = k < NUM_IN
        x = tl.load(x_rows[:, None] + k[None, :], valid[:, None] & inputs[None, :], 0.0)
        x = x.to(tl.float32)
        if norm_weight_ptr is not None:
            x = (x - mean[:, None]) * inverse[:, None]
            x *= tl.load(norm_weight_ptr + k, inputs, 0.0)[None, :]
            x += tl.load(norm_bias_ptr + k, inputs, 0.0)[None, :]
        mask = inputs[:, None] & outputs[None, :]
        sums = _multiply(x, weight_rows, k, mask, sums, SPLIT, DOT)
        if GLU:
            gates = _multiply(x, gate_rows, k, mask, gates, SPLIT, DOT)

    y = _finish(sums, scale_ptr, bias_ptr, n, outputs)
    if GLU:
        gates = _finish(gates, scale_ptr, bias_ptr, n + NUM_OUT, n < NUM_OUT)
        small = tl.exp(-tl.abs(gates))
        y *= tl.where(gates < 0, small, 1.0) / (1.0 + small)
    here = (m < rows)[:, None] & outputs[None, :]
    if residual_ptr is not None:
        residual = residual_ptr + top * residual_stride + left
        y += tl.load(residual + down[:, None] * residual_stride + right[None, :], here, 0.0)
    tl.store(y_ptr + top * NUM_OUT + left + down[:, None] * NUM_OUT + right[None, :], y, here)
