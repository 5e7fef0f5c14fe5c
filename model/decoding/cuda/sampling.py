"""Sampling on the device: as `model.decoding.sampling`, without penalties and biases.

Nothing here synchronises, so every call can be captured in a CUDA graph. Rows with filters are
searched rather than sorted: a token's weight, exp((logit - largest) / temperature), grows with its
logit, so a filter is a threshold on logits and, among equal logits, on ids. Tokens whose weights
are equal in float64 although their logits differ, as at a temperature of 1e20, are ordered by logit
here and by id there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.decoding.cuda.table import SamplerTable
from model.decoding.decoder import MAX_END_TOKENS

BLOCK = tl.constexpr(2048)
"""Tokens weighed at once."""

COLDEST = tl.constexpr(1e-260)
"""Below this temperature all tokens but the most probable have weight 0."""

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-0x7F800001)
"""Rank of -inf in the order of `_order`."""

FIRST, NONE = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
"""Below and above all ranks of that order and all ids."""

DIGITS = tl.constexpr(2.0**-53)
BELOW_1 = tl.constexpr(1 - 2.0**-52)


def choose(logits: Tensor, rows: Tensor, table: SamplerTable, chosen: Tensor) -> None:
    """Sample the next token of each sequence from logits `[batch, vocab]` float32, which are not
    changed.

    rows int32 `[batch]`: row of the table for each sequence, without duplicates; negative for none.
    chosen `[batch]` int32 receives the tokens: -1 for no sequence and for logits that are not a
    distribution (see `sample`). The row's position grows by 1 and its token becomes the sampled
    one, or -1 if there is none or it ends the text: steps already launched then skip the row.
    Raises ValueError for other shapes, dtypes and strides.
    """
    batch, vocab = logits.shape
    if logits.dtype != torch.float32 or (vocab > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be float32 with stride 1, not {logits.dtype} {logits.stride()}"
        )
    for name, tensor in (("rows", rows), ("chosen", chosen)):
        if tensor.shape != (batch,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 [{batch}]")
    if not batch * vocab:
        raise ValueError(f"cannot sample from logits {[*logits.shape]}")
    num_blocks = triton.cdiv(vocab, BLOCK.value)
    largest = torch.empty(batch, num_blocks, device=logits.device)
    first = torch.empty(batch, num_blocks, dtype=torch.int32, device=logits.device)
    sums = torch.empty(batch, num_blocks, dtype=torch.float64, device=logits.device)
    _summarise[batch, num_blocks](
        logits, rows, table.temperature, largest, first, sums,
        logits.stride(0), table.temperature.stride(0), VOCAB=vocab,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _choose[(batch,)](
        logits, rows, table.temperature, table.top_p, table.min_p, table.seed, table.position,
        table.top_k, table.token, table.ends, largest, first, sums, chosen,
        logits.stride(0), table.seed.stride(0), table.token.stride(0),
        VOCAB=vocab, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        MAX_ENDS=MAX_END_TOKENS, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """A number in [0, 1) with 53 random bits, as in `model.decoding.sampling`."""
    bits = _mix(_mix(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True))
    return (bits >> 11).to(tl.int64).to(tl.float64) * DIGITS


@triton.jit
def _load(logits_row: tl.tensor, block: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:  # noqa: N803
    """Ids and logits of a block; -inf beyond the vocabulary."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    return ids, tl.load(logits_row + ids, ids < VOCAB, -INF)


@triton.jit
def _weight_of(logits: tl.tensor, top: tl.tensor, cold: tl.tensor) -> tl.tensor:
    """exp((logit - largest) / temperature) in float64; `cold` is 1 / temperature."""
    return tl.exp((logits.to(tl.float64) - top) * cold)


@triton.jit
def _order(logits: tl.tensor) -> tl.tensor:
    """Maps float32 to int32 of the same order; 0 and -0 are equal."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _first_beyond(
    ids: tl.tensor, weights: tl.tensor, before: tl.tensor, target: tl.tensor
) -> tl.tensor:
    """The first id whose cumulative weight, starting at `before`, exceeds the target.

    If rounding lets none exceed it, the last id with a weight above 0.
    """
    some = weights > 0.0
    beyond = some & (before + tl.cumsum(weights, 0) > target)
    last = tl.max(tl.where(some, ids, -1), 0)
    first = tl.min(tl.where(beyond, ids, NONE), 0)
    return tl.where(first == NONE, last, first)


@triton.jit
def _summarise(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    first_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    logits_stride: tl.tensor,
    stride: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
) -> None:
    """Per block of a row: the largest logit, its first id, and the sum of weights relative to it.

    The largest is inf if the block has NaN or inf.
    """
    i, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + i).to(tl.int64)
    if row < 0:
        return
    ids, logits = _load(logits_ptr + i * logits_stride, block, VOCAB)
    broken = tl.max((~(logits < INF)).to(tl.int32), 0) > 0
    logits = tl.where(logits < INF, logits, -INF)
    largest = tl.max(logits, 0)
    first = tl.min(tl.where(logits == largest, ids, NONE), 0)
    place = i * tl.num_programs(1) + block
    tl.store(largest_ptr + place, tl.where(broken, INF, largest))
    tl.store(first_ptr + place, first)
    temperature = tl.load(temperature_ptr + row * stride)
    if temperature > 0.0:
        top = tl.where(largest == -INF, 0.0, largest).to(tl.float64)
        weights = _weight_of(logits, top, 1.0 / tl.maximum(temperature, COLDEST))
        tl.store(sums_ptr + place, tl.sum(weights, 0))


@triton.jit
def _kept(
    logits_row: tl.tensor,
    block: tl.tensor,
    top: tl.tensor,
    cold: tl.tensor,
    threshold: tl.tensor,
    equal: tl.tensor,
    min_p: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """Ids and weights of a block; 0 for filtered tokens.

    Logits above the threshold and the first `equal` ones at it pass; the remaining `equal` for the
    next block is returned too.
    """
    ids, logits = _load(logits_row, block, VOCAB)
    key = _order(logits)
    at = (key == threshold).to(tl.int32)
    kept = (key > threshold) | ((at > 0) & (tl.cumsum(at, 0) <= equal))
    weights = _weight_of(logits, top, cold)
    weights = tl.where(kept & (weights >= min_p), weights, 0.0)
    return ids, weights, equal - tl.sum(at, 0)


@triton.jit
def _total(
    logits_row: tl.tensor,
    top: tl.tensor,
    cold: tl.tensor,
    threshold: tl.tensor,
    equal: tl.tensor,
    min_p: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The sum of all weights that pass the filters, block by block."""
    total = 0.0 * top
    for block in tl.range(NUM_BLOCKS, num_stages=3):
        _, weights, equal = _kept(logits_row, block, top, cold, threshold, equal, min_p, VOCAB)
        total += tl.sum(weights, 0)
    return total


@triton.jit
def _above(
    logits_row: tl.tensor,
    top: tl.tensor,
    cold: tl.tensor,
    low: tl.tensor,
    middle: tl.tensor,
    high: tl.tensor,
    WEIGHED: tl.constexpr,  # noqa: N803
    VOCAB: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """How many tokens, and with `WEIGHED` how much weight, lie above each of three thresholds."""
    low, middle, high = low.to(tl.int32), middle.to(tl.int32), high.to(tl.int32)
    num_low, num_middle, num_high = _zeros(tl.int32)
    sum_low, sum_middle, sum_high = _zeros(tl.float64)
    for block in tl.range(NUM_BLOCKS, num_stages=3):
        _, logits = _load(logits_row, block, VOCAB)
        key = _order(logits)
        num_low += (key > low).to(tl.int32)
        num_middle += (key > middle).to(tl.int32)
        num_high += (key > high).to(tl.int32)
        if WEIGHED:
            weights = _weight_of(logits, top, cold)
            sum_low += tl.where(key > low, weights, 0.0)
            sum_middle += tl.where(key > middle, weights, 0.0)
            sum_high += tl.where(key > high, weights, 0.0)
    counts = tl.sum(num_low, 0), tl.sum(num_middle, 0), tl.sum(num_high, 0)
    return counts, (tl.sum(sum_low, 0), tl.sum(sum_middle, 0), tl.sum(sum_high, 0))


@triton.jit
def _zeros(DTYPE: tl.constexpr) -> tl.tensor:  # noqa: N803
    return tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)


@triton.jit
def _search(
    logits_row: tl.tensor,
    top: tl.tensor,
    cold: tl.tensor,
    count: tl.tensor,
    limit: tl.tensor,
    WEIGHED: tl.constexpr,  # noqa: N803
    VOCAB: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The lowest threshold with fewer than `count` tokens and less weight than `limit` above it.

    Each round tries three thresholds and keeps a quarter of the range between `low`, too low, and
    `high`, until one rank is left: at most 16 rounds. Returns the threshold, a token's rank, and
    the number of tokens and the weight above it, the weight only with `WEIGHED`.
    """
    low, high = tl.cast(LOWEST, tl.int64), _order(top.to(tl.float32)).to(tl.int64)
    num_low, num_high = tl.cast(VOCAB, tl.int32), tl.cast(0, tl.int32)
    weight = tl.cast(0.0, tl.float64)
    while (high - low > 1) & (num_low - num_high > 1):
        quarter, half = low + (high - low) // 4, low + (high - low) // 2
        last = low + (high - low) * 3 // 4
        nums, sums = _above(logits_row, top, cold, quarter, half, last, WEIGHED, VOCAB, NUM_BLOCKS)
        if (nums[0] < count) & (sums[0] < limit):
            high, num_high, weight = quarter, nums[0], sums[0]
        elif (nums[1] < count) & (sums[1] < limit):
            low, num_low, high, num_high, weight = quarter, nums[0], half, nums[1], sums[1]
        elif (nums[2] < count) & (sums[2] < limit):
            low, num_low, high, num_high, weight = half, nums[1], last, nums[2], sums[2]
        else:
            low, num_low = last, nums[2]
    threshold = tl.cast(FIRST, tl.int32)
    for block in tl.range(NUM_BLOCKS, num_stages=3):
        _, logits = _load(logits_row, block, VOCAB)
        key = _order(logits)
        threshold = tl.maximum(threshold, tl.max(tl.where(key <= high, key, FIRST), 0))
    return threshold, num_high, weight


@triton.jit
def _draw_filtered(
    logits_row: tl.tensor,
    top: tl.tensor,
    cold: tl.tensor,
    point: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The token of a row with filters, or -1 if none passes."""
    threshold, equal = tl.cast(FIRST, tl.int32), tl.cast(0, tl.int32)
    count, all_p = tl.cast(NONE, tl.int32), tl.cast(0.0, tl.float64)
    if (top_k > 0) & (top_k < VOCAB):
        count = top_k
        no_limit = tl.cast(INF, tl.float64)
        threshold, above, _ = _search(
            logits_row, top, cold, count, no_limit, False, VOCAB, NUM_BLOCKS
        )
        equal = count - above
    if top_p < 1.0:
        limit = top_p * _total(logits_row, top, cold, threshold, equal, all_p, VOCAB, NUM_BLOCKS)
        threshold, above, weight = _search(
            logits_row, top, cold, count, limit, True, VOCAB, NUM_BLOCKS
        )
        bits = tl.where(threshold < 0, threshold ^ NONE, threshold)
        own = _weight_of(bits.to(tl.float32, bitcast=True), top, cold)
        # Among equal tokens, add one while the weight before it is below the limit; negligible
        # weights do not count.
        needed = tl.ceil((limit - weight) / tl.maximum(own, 1e-200))
        needed = tl.maximum(tl.minimum(needed, VOCAB), 1.0).to(tl.int32)
        equal = tl.minimum(needed, count - above)
    total = _total(logits_row, top, cold, threshold, equal, min_p, VOCAB, NUM_BLOCKS)
    target = tl.minimum(point * total, total * BELOW_1)
    token, before = tl.cast(-1, tl.int32), tl.cast(0.0, tl.float64)
    for block in tl.range(NUM_BLOCKS, num_stages=3):
        ids, weights, equal = _kept(logits_row, block, top, cold, threshold, equal, min_p, VOCAB)
        after = before + tl.sum(weights, 0)
        if (token < 0) & (after > target):
            token = _first_beyond(ids, weights, before, target)
        before = after
    return token


@triton.jit
def _choose(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    token_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    first_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    logits_stride: tl.tensor,
    stride: tl.tensor,
    short_stride: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    MAX_ENDS: tl.constexpr,  # noqa: N803
) -> None:
    """Sample one sequence's token from the summary of `_summarise`; only filters read all logits
    again."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i).to(tl.int64)
    token = tl.cast(-1, tl.int32)
    if row < 0:
        tl.store(chosen_ptr + i, token)
        return
    blocks = tl.arange(0, BLOCKS)
    here, place = blocks < NUM_BLOCKS, i * NUM_BLOCKS + blocks
    largest = tl.load(largest_ptr + place, here, -INF)
    temperature = tl.load(temperature_ptr + row * stride)
    position = tl.load(position_ptr + row * stride)
    logits_row = logits_ptr + i * logits_stride
    if (tl.max(largest, 0) < INF) & (tl.max(largest, 0) > -INF):
        if temperature > 0.0:
            top = tl.max(largest, 0).to(tl.float64)
            cold = 1.0 / tl.maximum(temperature, COLDEST)
            point = _uniform(tl.load(seed_ptr + row * stride), position)
            top_k = tl.load(top_k_ptr + row * short_stride)
            top_p, min_p = tl.load(top_p_ptr + row * stride), tl.load(min_p_ptr + row * stride)
            if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
                token = _draw_filtered(
                    logits_row, top, cold, point, top_k, top_p, min_p, VOCAB, NUM_BLOCKS
                )
            else:
                weights = tl.load(sums_ptr + place, here, 0.0) * _weight_of(largest, top, cold)
                total = tl.sum(weights, 0)
                target = tl.minimum(point * total, total * BELOW_1)
                block = _first_beyond(blocks, weights, 0.0 * total, target)
                before = tl.sum(tl.where(blocks < block, weights, 0.0), 0)
                ids, logits = _load(logits_row, block, VOCAB)
                token = _first_beyond(ids, _weight_of(logits, top, cold), before, target)
        else:
            block = tl.min(tl.where(largest == tl.max(largest, 0), blocks, BLOCKS), 0)
            token = tl.load(first_ptr + i * NUM_BLOCKS + block)
    tl.store(chosen_ptr + i, token)
    tl.store(position_ptr + row * stride, position + 1)
    ends = tl.load(ends_ptr + row * short_stride + tl.arange(0, MAX_ENDS))
    ended = tl.max((ends == token).to(tl.int32), 0) > 0
    tl.store(token_ptr + row * short_stride, tl.where(ended, -1, token))
