"""The whole network for some tokens of some sequences, and one product, as compiled calls.

Numba compiles each at its first use and keeps the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, float32, float64, int8, int64, types, uint16

from model.cpu.functions import CACHE, SOURCE, call, jit, pointer
from model.cpu.kernels import attend, glu, layer_norm, position
from model.cpu.products import BLOCK, number, product

# The call reads its arguments, numbers and addresses, from one array of int64 in this order.
(
    TOKENS, SEQUENCES, D_EMB, HEADS, D_KEY, D_VAL, LAYERS, VOCAB, LOG_VALUES, POOL_ROWS,
    IDS, STARTS, INDEX, NUM_READ, READ, LOGITS, H, LAST, M, Z, S, Z_LOW, S_LOW, N,
    X, NORMED, PROJECTED, Y, GATES, GLU,
    EMBED, POSITION, NORM, UNEMBED, LAYER_TABLE,
    THREAD, THREADS, BARRIER, NUM_FORWARD,
) = range(39)  # fmt: skip

# A product's.
(
    IN_ROWS, IN_SIZE, OUT_SIZE, WEIGHT, SCALE, BIAS, IN, OUT,
    IN_THREAD, IN_THREADS, IN_BARRIER, NUM_PRODUCT,
) = range(12)  # fmt: skip

LAYER_FIELDS = 11
"""Of a layer: its norm's weight and bias, then weight, scale and bias of its three products."""

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
    """Logits of some rows of x, in the order of their places."""
    count, d, vocab = len(places), a[D_EMB], a[VOCAB]
    normed = _array(a[NORMED], (count, d), float32)
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
    NUM_READ tokens, whose places are in READ, get logits: in the order of the places. Where LAST is
    not 0, each sequence reads one token and keeps what the last layer made of it; and where IDS is
    0, none reads any, and the logits are those after what was so kept.
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
    read = _array(a[READ], (num_read,), int64)
    x, normed = _array(a[X], (tokens, d), float32), _array(a[NORMED], (tokens, d), float32)
    projected = _array(a[PROJECTED], (tokens, heads * per_head), float32)
    y = _array(a[Y], (tokens, heads * d_val), float32)
    gates, gated = _array(a[GATES], (tokens, 2 * d), float32), _array(a[GLU], (tokens, d), float32)
    last = _array(a[LAST], (pool if a[LAST] else 0, d), float32)
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
    no_maximum = np.empty(0, np.float32)
    keys, vals = np.empty((3, d_key), np.float32), np.empty((3, d_val), np.float32)

    embed = _array(a[EMBED], (vocab, d), embed_dtype)
    for t in range(tid, tokens, n):
        for j in range(d):
            normed[t, j] = number(embed[ids[t], j])
    _wait(barrier)
    w, scale, bias = _weight(_array(a[POSITION], (3,), int64), 0, d, 2 * d, weight_dtype)
    product(normed, w, scale, bias, gates, False, tid, n)
    _wait(barrier)
    position(gates, normed, starts, h, index, x, tid, n)
    _wait(barrier)
    table = _array(a[LAYER_TABLE], (num_layers, LAYER_FIELDS), int64)
    for layer in range(num_layers):
        at = table[layer]
        layer_norm(x, _array(at[0], (d,), float32), _array(at[1], (d,), float32), normed, tid, n)
        _wait(barrier)
        w, scale, bias = _weight(at, 2, d, heads * per_head, weight_dtype)
        product(normed, w, scale, bias, projected, False, tid, n)
        _wait(barrier)
        items = sequences * heads
        for item in range(tid * items // n, (tid + 1) * items // n):
            i, head = item // heads, item % heads
            row, first = index[i], head * per_head
            for t in range(starts[i], starts[i + 1]):
                p = projected[t, first : first + per_head]
                attend(
                    p[:d_key], p[d_key : 2 * d_key], p[2 * d_key :],
                    m[layer, row, head], z[layer, row, head], s[layer, row, head],
                    z_low[layer, row, head], s_low[layer, row, head],
                    n_max[layer, row, head] if log_values else no_maximum,
                    log_values, y[t, head * d_val : (head + 1) * d_val], keys, vals,
                )  # fmt: skip
        if layer == num_layers - 1 and not num_read:
            return
        _wait(barrier)
        w, scale, bias = _weight(at, 5, heads * d_val, 2 * d, weight_dtype)
        product(y, w, scale, bias, gates, False, tid, n)
        _wait(barrier)
        glu(gates, gated, tid, n)
        _wait(barrier)
        w, scale, bias = _weight(at, 8, d, d, weight_dtype)
        product(gated, w, scale, bias, x, True, tid, n)
        _wait(barrier)
    if a[LAST]:
        for t in range(tid, tokens, n):
            last[index[t]] = x[t]
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
