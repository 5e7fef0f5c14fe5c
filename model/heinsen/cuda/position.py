"""The recurrence of latent positions in Triton: `heinsen.layers.LatentPosition`, and its sum with
the embedding.

h_t = logaddexp(logsigmoid(a_t) + h_{t-1}, b_t), all in float64: if gates forget nothing, h is the
log of a sum over all tokens. Nothing here synchronises, so every call can be captured in a CUDA
graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(6)
SPAN = tl.constexpr(2**6)
"""Tokens per program. Splitting at multiples of it does not change the bits."""

BLOCK, BLOCK_SCAN = tl.constexpr(128), tl.constexpr(32)
"""Channels per program, for one token and for a span."""

NOTHING = tl.constexpr(-1e300)
"""Logarithm of zero: below any sum of float32 numbers, but finite, so that no difference is NaN."""


def step(gates: Tensor, table: Tensor, ids: Tensor, h: Tensor, rows: Tensor) -> Tensor:
    """One token per sequence: x `[batch, d]` float32 = table[ids] + h, h updated in place.

    gates `[batch, 2 * d]` float32 are [a, b]; table `[vocab, d]` float32 or bfloat16; ids int32 or
    int64 and rows int32 `[batch]`; h `[pool_rows, d]` float64, of which sequence i has row rows[i],
    without duplicates. Where the row or the id is negative, nothing is read or written, and x is 0.
    Raises ValueError for other shapes, dtypes and strides.
    """
    batch, d_emb = gates.shape[0], h.shape[1]
    _check(gates, table, ids, h, rows, (batch,))
    x = torch.empty(batch, d_emb, device=h.device)
    if batch:
        grid = (batch, triton.cdiv(d_emb, BLOCK.value))
        _step[grid](gates, table, ids, h, rows, x, D_EMB=d_emb, num_warps=4, enable_fp_fusion=True)
    return x


def scan(
    gates: Tensor, table: Tensor, ids: Tensor, h: Tensor, rows: Tensor, lengths: Tensor
) -> Tensor:
    """The first lengths[i] tokens of each sequence: x `[batch, tokens, d]`, h after the last one.

    gates `[batch, tokens, 2 * d]`, ids `[batch, tokens]` (not negative), lengths int32 `[batch]`,
    the rest as for `step`. x is 0 beyond a sequence's length, whatever the gates and ids there.

    A span of tokens is a map h -> logaddexp(decay + h, b). The maps of all spans are computed in
    parallel, then h before each span in sequence, then all tokens in parallel.
    """
    batch, tokens = ids.shape
    d_emb = h.shape[1]
    _check(gates, table, ids, h, rows, (batch, tokens))
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be int32 [{batch}], not {lengths.dtype} {[*lengths.shape]}")
    x = torch.empty(batch, tokens, d_emb, device=h.device)
    if not batch * tokens:
        return x
    num_spans, blocks = triton.cdiv(tokens, SPAN.value), triton.cdiv(d_emb, BLOCK_SCAN.value)
    spans = torch.empty(2, batch, num_spans, d_emb, dtype=torch.float64, device=h.device)
    decay, b = spans.unbind()
    grid, sizes = (num_spans, batch, blocks), (tokens, num_spans)
    _spans[grid](
        gates, rows, lengths, decay, b, *sizes, D_EMB=d_emb, num_warps=8, enable_fp_fusion=True
    )
    carried = (batch, triton.cdiv(d_emb, BLOCK.value))
    _carry[carried](
        decay, b, h, rows, lengths, num_spans, D_EMB=d_emb, num_warps=4, enable_fp_fusion=True
    )
    _read[grid](
        gates, table, ids, rows, lengths, b, x, *sizes,
        D_EMB=d_emb, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return x


def _check(
    gates: Tensor, table: Tensor, ids: Tensor, h: Tensor, rows: Tensor, sizes: tuple[int, ...]
) -> None:
    d_emb = h.shape[1]
    expected = (
        ("gates", gates, (*sizes, 2 * d_emb), (torch.float32,)),
        ("table", table, (table.shape[0], d_emb), (torch.float32, torch.bfloat16)),
        ("ids", ids, sizes, (torch.int32, torch.int64)),
        ("h", h, (h.shape[0], d_emb), (torch.float64,)),
        ("rows", rows, sizes[:1], (torch.int32,)),
    )
    for name, tensor, shape, dtypes in expected:
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {[*shape]} of {dtypes},"
                f" not {[*tensor.shape]} {tensor.stride()} of {tensor.dtype}"
            )


@triton.jit
def _add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """log(exp(a) + exp(b)) for finite numbers."""
    return tl.maximum(a, b, tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _gates(
    place: tl.tensor,
    channels: tl.tensor,
    here: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """logsigmoid(a) and b of one token."""
    a = tl.load(place + channels, here, 0.0).to(tl.float64)
    b = tl.load(place + D_EMB + channels, here, 0.0).to(tl.float64)
    decay = tl.minimum(a, 0.0, tl.PropagateNan.ALL) - tl.log(1.0 + tl.exp(-tl.abs(a)))
    return decay, b


@triton.jit
def _step(
    gates_ptr: tl.tensor,
    table_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    h_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    x_ptr: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> None:
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channels < D_EMB
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    token = tl.load(ids_ptr + sequence).to(tl.int64)
    known = channels < tl.where((row >= 0) & (token >= 0), D_EMB, 0)
    decay, b = _gates(gates_ptr + sequence * 2 * D_EMB, channels, known, D_EMB)
    h = _add(decay + tl.load(h_ptr + row * D_EMB + channels, known, 0.0), b)
    tl.store(h_ptr + row * D_EMB + channels, h, known)
    emb = tl.load(table_ptr + token * D_EMB + channels, known, 0.0).to(tl.float32)
    x = tl.where(known, emb + h.to(tl.float32), 0.0)
    tl.store(x_ptr + sequence * D_EMB + channels, x, here)


@triton.jit
def _scan_span(
    gates_ptr: tl.tensor,
    token: tl.tensor,
    known: tl.tensor,
    channels: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The maps from h before a span to each h_t in it: decay and b `[SPAN, BLOCK_SCAN]`.

    Two steps (A1, b1) and (A2, b2) compose to (A1 + A2, logaddexp(A2 + b1, b2)), so each round
    doubles the tokens per map. Padding is the identity, (0, NOTHING).
    """
    decay, b = _gates(gates_ptr + token * 2 * D_EMB, channels, known, D_EMB)
    decay, b = tl.where(known, decay, 0.0), tl.where(known, b, NOTHING)
    t = tl.broadcast_to(tl.arange(0, SPAN)[:, None], [SPAN, BLOCK_SCAN])
    for i in tl.static_range(ROUNDS):
        before, joined = tl.maximum(t - (1 << i), 0), t >= 1 << i
        b = tl.where(joined, _add(decay + tl.gather(b, before, 0), b), b)
        decay += tl.where(joined, tl.gather(decay, before, 0), 0.0)
    return decay, b


@triton.jit(do_not_specialize=["tokens", "num_spans"])
def _spans(
    gates_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    decay_ptr: tl.tensor,
    b_ptr: tl.tensor,
    tokens: tl.tensor,
    num_spans: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> None:
    """The map of each span that has tokens."""
    span, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * BLOCK_SCAN + tl.arange(0, BLOCK_SCAN)
    length = tl.minimum(tokens, tl.load(lengths_ptr + sequence))
    if (tl.load(rows_ptr + sequence) < 0) | (span * SPAN >= length):
        return
    own = tl.arange(0, SPAN)
    token = span * SPAN + own
    known = (token < length)[:, None] & (channels < D_EMB)[None, :]
    place = (sequence * tokens + token)[:, None]
    decay, b = _scan_span(gates_ptr, place, known, channels[None, :], D_EMB)
    last = (own == SPAN - 1)[:, None]
    place = (sequence * num_spans + span) * D_EMB + channels
    tl.store(decay_ptr + place, tl.sum(tl.where(last, decay, 0.0), 0), channels < D_EMB)
    tl.store(b_ptr + place, tl.sum(tl.where(last, b, 0.0), 0), channels < D_EMB)


@triton.jit(do_not_specialize=["num_spans"])
def _carry(
    decay_ptr: tl.tensor,
    b_ptr: tl.tensor,
    h_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    num_spans: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> None:
    """Replace each span's b by h before it, and write h after the last span to its row."""
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channels < D_EMB
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    count = tl.minimum(num_spans, tl.cdiv(tl.load(lengths_ptr + sequence), SPAN))
    if (row < 0) | (count <= 0):
        return
    h = tl.load(h_ptr + row * D_EMB + channels, here, 0.0)
    place = sequence * num_spans * D_EMB + channels
    decay, b = tl.load(decay_ptr + place, here, 0.0), tl.load(b_ptr + place, here, 0.0)
    span = 0
    while span < count:
        span += 1
        more = channels < tl.where(span < count, D_EMB, 0)  # loaded early to hide latency
        next_decay = tl.load(decay_ptr + place + D_EMB, more, 0.0)
        next_b = tl.load(b_ptr + place + D_EMB, more, 0.0)
        tl.store(b_ptr + place, h, here)
        h = _add(decay + h, b)
        place += D_EMB
        decay, b = next_decay, next_b
    tl.store(h_ptr + row * D_EMB + channels, h, here)


@triton.jit(do_not_specialize=["tokens", "num_spans"])
def _read(
    gates_ptr: tl.tensor,
    table_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    before_ptr: tl.tensor,
    x_ptr: tl.tensor,
    tokens: tl.tensor,
    num_spans: tl.tensor,
    D_EMB: tl.constexpr,  # noqa: N803
) -> None:
    """x of a span's tokens, from h before it."""
    span, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * BLOCK_SCAN + tl.arange(0, BLOCK_SCAN)
    here = channels < D_EMB
    length = tl.minimum(tokens, tl.load(lengths_ptr + sequence))
    token = span * SPAN + tl.arange(0, SPAN)
    place = sequence * tokens + token
    x = tl.zeros([SPAN, BLOCK_SCAN], tl.float32)
    if (tl.load(rows_ptr + sequence) >= 0) & (span * SPAN < length):
        known = (token < length)[:, None] & here[None, :]
        decay, b = _scan_span(gates_ptr, place[:, None], known, channels[None, :], D_EMB)
        before = (sequence * num_spans + span) * D_EMB + channels
        all_h = _add(decay + tl.load(before_ptr + before, here, 0.0)[None, :], b)
        ids = tl.load(ids_ptr + place, token < length, 0).to(tl.int64)
        emb = tl.load(table_ptr + ids[:, None] * D_EMB + channels[None, :], known, 0.0)
        x = tl.where(known, emb.to(tl.float32) + all_h.to(tl.float32), 0.0)
    written = (token < tokens)[:, None] & here[None, :]
    tl.store(x_ptr + place[:, None] * D_EMB + channels[None, :], x, written)
