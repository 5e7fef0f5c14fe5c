"""The whole network for some tokens of some sequences, and one product, as compiled calls.

Numba compiles each at its first use and keeps the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, float32, float64, int8, int64, types, uint16

from model.config import DECAY_RANK
from model.cpu.functions import CACHE, SOURCE, call, jit, pointer
from model.cpu.kernels import attend, decay, gate, glu, layer_norm, mix, position
from model.cpu.products import BLOCK, number, product

# The call reads its arguments, numbers and addresses, from one array of int64 in this order.
(
    TOKENS, SEQUENCES, D_EMB, HEADS, D_KEY, D_VAL, LAYERS, VOCAB, LOG_VALUES, POOL_ROWS,
    IDS, STARTS, INDEX, NUM_KEPT, KEPT, ENDS, NUM_READ, READ, LOGITS,
    H, LAST, M, Z, S, Z_LOW, S_LOW, N, PREVIOUS,
    X, NORMED, PROJECTED, Y, GATES, GLU, RANK, RATES, OUTPUT_GATE,
    EMBED, POSITION, NORM, UNEMBED, LAYER_TABLE,
    THREAD, THREADS, BARRIER, NUM_FORWARD,
) = range(46)  # fmt: skip

# A product's.
(
    IN_ROWS, IN_SIZE, OUT_SIZE, WEIGHT, SCALE, BIAS, IN, OUT,
    IN_THREAD, IN_THREADS, IN_BARRIER, NUM_PRODUCT,
) = range(12)  # fmt: skip

LAYER_FIELDS = 21
"""Of a layer: its norm's weight and bias; weight, scale and bias of its three products; the shares
of `token_shift`; weight, scale and bias of the two products of `decay` and of the output gate's.
0 for what it does not have."""

DTYPES = {torch.float32: float32, torch.bfloat16: uint16, torch.int8: int8}
"""How compiled code sees the numbers of a weight."""


@jit
def _array(address: Any, shape: Any, dtype: Any) -> Any:
    return carray(pointer(address), shape, dtype)


@jit
def _weight(table: Any, at: Any, num_inputs: Any, num_outputs: Any, dtype: Any) -> Any:
    """Weight, scale and bias whose addresses stand in a table; 0 where there is none."""
    blocks = (num_outputs + BLOCK - 1) // BLOCK
    return (
        _array(table[at], (blocks, num_inputs, BLOCK), dtype),
        _array(table[at + 1], (num_outputs if table[at + 1] else 0,), float32),
        _array(table[at + 2], (num_outputs if table[at + 2] else 0,), float32),
    )


@jit
def _wait(barrier: Any) -> None:
    """Until all threads of the team have come here."""
    if barrier:
        call(barrier)


@jit
def _unembed(a: Any, x: Any, places: Any, weight_dtype: Any, tid: Any, n: Any) -> None:
    """Logits of some rows of x, in the order of their places; x is not where A[X] is."""
    count, d, vocab = len(places), a[D_EMB], a[VOCAB]
    normed = _array(a[X], (count, d), float32)
    at = _array(a[NORM], (2,), int64)
    gain, offset = _array(at[0], (d,), float32), _array(at[1], (d,), float32)
    for i in range(tid, count, n):
        place = places[i]
        layer_norm(x[place : place + 1], gain, offset, normed[i : i + 1], 0, 1)
    _wait(a[BARRIER])
    w, scale, bias = _weight(_array(a[UNEMBED], (3,), int64), 0, d, vocab, weight_dtype)
    logits = _array(a[LOGITS], (count, vocab), float32)
    product(normed, w, scale, bias, logits, False, tid, n)


@jit
def _forward(a: Any, weight_dtype: Any, embed_dtype: Any) -> None:
    """Read tokens into states; logits after some of them. Every thread of a team runs it.

    The tokens of all sequences stand one after another, those of i from starts[i] to starts[i + 1].
    Each goes through attention as in a decoding step, so it does not matter how many come at once.
    Only the NUM_KEPT tokens whose places are in KEPT go on beyond the last layer's attention. Among
    them ENDS[i] is the last token of sequence i, of which its row keeps what that layer made; and
    READ are the NUM_READ tokens that get logits. Where IDS is 0, no sequence reads any token, and
    the logits are those after what was so kept.
    """
    tid, n, barrier = int64(0), int64(1), a[BARRIER]
    if barrier:
        tid, n = int64(call(a[THREAD])), int64(call(a[THREADS]))
    tokens, sequences, pool = a[TOKENS], a[SEQUENCES], a[POOL_ROWS]
    d, heads, d_key, d_val = a[D_EMB], a[HEADS], a[D_KEY], a[D_VAL]
    num_layers, vocab, num_read = a[LAYERS], a[VOCAB], a[NUM_READ]
    log_values, per_head = a[LOG_VALUES] != 0, 2 * d_key + d_val
    ids, index = _array(a[IDS], (tokens,), int64), _array(a[INDEX], (sequences,), int64)
    starts = _array(a[STARTS], (sequences + 1,), int64)
    num_kept = a[NUM_KEPT]
    kept, ends = _array(a[KEPT], (num_kept,), int64), _array(a[ENDS], (sequences,), int64)
    read = _array(a[READ], (num_read,), int64)
    firsts = sequences if a[PREVIOUS] else 0  # rows behind the tokens' for what came before them
    x = _array(a[X], (tokens, d), float32)
    normed = _array(a[NORMED], (tokens + firsts, d), float32)
    projected = _array(a[PROJECTED], (tokens + firsts, heads * per_head), float32)
    rank = _array(a[RANK], (tokens, DECAY_RANK), float32)
    rates = _array(a[RATES], (tokens, heads * d_key), float32)
    output_gate = _array(a[OUTPUT_GATE], (tokens, heads * d_val), float32)
    y = _array(a[Y], (tokens, heads * d_val), float32)
    gates, gated = _array(a[GATES], (tokens, 2 * d), float32), _array(a[GLU], (tokens, d), float32)
    last = _array(a[LAST], (pool, d), float32)
    if not a[IDS]:
        _unembed(a, last, index, weight_dtype, tid, n)
        return
    h = _array(a[H], (pool, d), float64)
    m = _array(a[M], (num_layers, pool, heads, d_key), float32)
    z = _array(a[Z], (num_layers, pool, heads, d_key), float32)
    s = _array(a[S], (num_layers, pool, heads, d_key, d_val), float32)
    z_low = _array(a[Z_LOW], (num_layers, pool, heads, d_key), int8)
    s_low = _array(a[S_LOW], (num_layers, pool, heads, d_key, d_val), int8)
    n_max = _array(a[N], (num_layers, pool, heads if log_values else 0, d_val), float32)
    previous = _array(a[PREVIOUS], (num_layers, pool if firsts else 0, d), float32)
    no_maximum, before = np.empty(0, np.float32), np.empty(per_head, np.float32)
    keys, vals = np.empty((3, d_key), np.float32), np.empty((3, d_val), np.float32)

    embed = _array(a[EMBED], (vocab, d), embed_dtype)
    for t in range(tid, tokens, n):
        for j in range(d):
            normed[t, j] = number(embed[ids[t], j])
    _wait(barrier)
    w, scale, bias = _weight(_array(a[POSITION], (3,), int64), 0, d, 2 * d, weight_dtype)
    product(normed[:tokens], w, scale, bias, gates, False, tid, n)
    _wait(barrier)
    position(gates, normed[:tokens], starts, h, index, x, tid, n)
    _wait(barrier)
    table = _array(a[LAYER_TABLE], (num_layers, LAYER_FIELDS), int64)
    for layer in range(num_layers):
        at = table[layer]
        layer_norm(x, _array(at[0], (d,), float32), _array(at[1], (d,), float32), normed, tid, n)
        for i in range(tid, firsts, n):
            normed[tokens + i] = previous[layer, index[i]]
        _wait(barrier)
        w, scale, bias = _weight(at, 2, d, heads * per_head, weight_dtype)
        product(normed, w, scale, bias, projected, False, tid, n)
        shifts, decays, is_gated = at[11] != 0, at[12] != 0, at[18] != 0
        share = _array(at[11], (heads * per_head if shifts else 0,), float32)
        if is_gated:
            w, scale, bias = _weight(at, 18, d, heads * d_val, weight_dtype)
            product(normed[:tokens], w, scale, bias, output_gate, False, tid, n)
        if decays:
            w, scale, bias = _weight(at, 12, d, DECAY_RANK, weight_dtype)
            product(normed[:tokens], w, scale, bias, rank, False, tid, n)
            _wait(barrier)
            w, scale, bias = _weight(at, 15, DECAY_RANK, heads * d_key, weight_dtype)
            product(rank, w, scale, bias, rates, False, tid, n)
        _wait(barrier)
        for i in range(tid, firsts, n):
            previous[layer, index[i]] = normed[starts[i + 1] - 1]
        for item in range(sequences * heads):
            i, head = item // heads, item % heads
            place = starts[i] * heads + head * (starts[i + 1] - starts[i])
            if place * n // (tokens * heads) != tid:
                continue  # each thread has as many tokens as the others, also of a long prompt
            row, first = index[i], head * per_head
            if shifts:
                before[:] = projected[tokens + i, first : first + per_head]
            for t in range(starts[i], starts[i + 1]):
                p = projected[t, first : first + per_head]
                if shifts:
                    mix(p, share[first : first + per_head], before)
                if decays:
                    decay(rates[t, head * d_key : (head + 1) * d_key], m[layer, row, head])
                attend(
                    p[:d_key], p[d_key : 2 * d_key], p[2 * d_key :],
                    m[layer, row, head], z[layer, row, head], s[layer, row, head],
                    z_low[layer, row, head], s_low[layer, row, head],
                    n_max[layer, row, head] if log_values else no_maximum,
                    log_values, decays, y[t, head * d_val : (head + 1) * d_val], keys, vals,
                )  # fmt: skip
                if is_gated:
                    columns = slice(head * d_val, (head + 1) * d_val)
                    gate(y[t, columns], output_gate[t, columns])
        _wait(barrier)
        if layer == num_layers - 1:
            all_x, all_y = x, y
            x = _array(a[NORMED], (num_kept, d), float32)
            y = _array(a[PROJECTED], (num_kept, heads * d_val), float32)
            for i in range(tid, num_kept, n):
                x[i], y[i] = all_x[kept[i]], all_y[kept[i]]
            gates = _array(a[GATES], (num_kept, 2 * d), float32)
            gated = _array(a[GLU], (num_kept, d), float32)
            _wait(barrier)
        w, scale, bias = _weight(at, 5, heads * d_val, 2 * d, weight_dtype)
        product(y, w, scale, bias, gates, False, tid, n)
        _wait(barrier)
        glu(gates, gated, tid, n)
        _wait(barrier)
        w, scale, bias = _weight(at, 8, d, d, weight_dtype)
        product(gated, w, scale, bias, x, True, tid, n)
        _wait(barrier)
    for i in range(tid, sequences, n):
        last[index[i]] = x[ends[i]]
    _unembed(a, x, read, weight_dtype, tid, n)


@jit
def _product(a: Any, weight_dtype: Any) -> None:
    """out = in @ weight^T * scale + bias; every thread of the team runs it."""
    tid, n = int64(0), int64(1)
    if a[IN_BARRIER]:
        tid, n = int64(call(a[IN_THREAD])), int64(call(a[IN_THREADS]))
    rows, num_inputs, num_outputs = a[IN_ROWS], a[IN_SIZE], a[OUT_SIZE]
    w, scale, bias = _weight(a, WEIGHT, num_inputs, num_outputs, weight_dtype)
    x, y = _array(a[IN], (rows, num_inputs), float32), _array(a[OUT], (rows, num_outputs), float32)
    product(x, w, scale, bias, y, False, tid, n)


_FUNCTION_OF_A_THREAD = types.void(types.voidptr)


@functools.cache
def forward_function(dtype: torch.dtype, embed_dtype: torch.dtype) -> Any:
    """`void f(int64 *arguments)` for weights of one dtype and embeddings of another."""
    weights, embeddings, source = DTYPES[dtype], DTYPES[embed_dtype], SOURCE

    @cfunc(_FUNCTION_OF_A_THREAD, cache=CACHE)
    def run(arguments: Any) -> None:
        if source:
            _forward(carray(arguments, (NUM_FORWARD,), int64), weights, embeddings)

    return run


@functools.cache
def product_function(dtype: torch.dtype) -> Any:
    """`void f(int64 *arguments)` for a weight of this dtype."""
    weights, source = DTYPES[dtype], SOURCE

    @cfunc(_FUNCTION_OF_A_THREAD, cache=CACHE)
    def run(arguments: Any) -> None:
        if source:
            _product(carray(arguments, (NUM_PRODUCT,), int64), weights)

    return run
