"""The whole network for tokens of several sequences, as one compiled call.

Numba compiles it at first use and caches the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, float32, float64, int8, int64, uint16

from model.heinsen.config import DECAY_RANK
from model.heinsen.cpu.kernels import attend, fetch, position, workspace
from model.kernels.cpu.arithmetic import Arithmetic
from model.kernels.cpu.functions import CACHE, SOURCE, jit
from model.kernels.cpu.linear import (
    ADDRESS,
    COUNT,
    THREAD_FUNCTION,
    WEIGHT,
    array,
    wait,
    weight,
)
from model.kernels.cpu.products import number, product
from model.kernels.cpu.rows import gate, glu, layer_norm, mix
from model.kernels.cpu.threads import THREADS

TOGETHER = 16
"""Tokens of a sequence for which a part of the state stays in registers."""

NORM = np.dtype([("gain", ADDRESS), ("offset", ADDRESS)])

LAYER = np.dtype(
    [
        ("norm", NORM),
        *((name, WEIGHT) for name in ("project", "gate", "merge")),
        ("mix", ADDRESS),
        *((name, WEIGHT) for name in ("rank", "rates", "output_gate")),
    ]
)
"""A layer: its norm and three products; the shares of `token_shift`; the two products of `decay`
and that of the output gate. 0 if absent."""

STATE = ("h", "last", "m", "z", "s", "z_low", "s_low", "n", "previous")
"""Tensors of a pool."""

SPACE = (
    *("x", "normed", "projected", "y", "gates", "glu"),
    *("rank", "rates", "output_gate"),
)
"""Workspace."""

FORWARD = np.dtype(
    [
        ("threads", THREADS),
        *((name, COUNT) for name in ("d_emb", "heads", "d_key", "d_val", "layers", "vocab")),
        *((name, COUNT) for name in ("log_values", "pool_rows", "tokens", "sequences")),
        *((name, COUNT) for name in ("num_retained", "num_read")),
        *((name, ADDRESS) for name in ("ids", "starts", "index", "kept", "ends", "read", "logits")),
        *((name, ADDRESS) for name in (*STATE, *SPACE)),
        ("embed", ADDRESS),
        ("position", WEIGHT),
        ("norm", NORM),
        ("unembed", WEIGHT),
        ("layer_table", ADDRESS),
    ]
)
"""Arguments of `forward_function`: numbers, and addresses of arrays."""


@jit
def _unembed(a: Any, x: Any, places: Any, numbers: Any, tid: Any, n: Any) -> None:
    """Logits of some rows of x, in the order of `places`; x is not the workspace of that name."""
    count, d, vocab = len(places), a.d_emb, a.vocab
    normed = array(a.x, (count, d), float32)
    gain, offset = array(a.norm.gain, (d,), float32), array(a.norm.offset, (d,), float32)
    for i in range(tid, count, n):
        place = places[i]
        layer_norm(x[place : place + 1], gain, offset, normed[i : i + 1], 0, 1)
    wait(a.threads)
    w, scale, bias = weight(a.unembed, d, vocab, numbers)
    logits = array(a.logits, (count, vocab), float32)
    product(normed, w, scale, bias, logits, False, tid, n)


@jit
def _forward(a: Any, numbers: Any, embed_numbers: Any) -> None:
    """Read tokens into states; logits after some of them. All threads run it.

    The tokens of all sequences are concatenated, those of i from starts[i] to starts[i + 1]. Each
    goes through attention as in a decoding step, so the bits do not depend on the number of tokens.
    Only the `num_retained` tokens in `kept` continue after the last layer's attention. Among them
    ends[i] is the last token of sequence i, whose row stores that layer's output; and `read` are
    the `num_read` tokens that get logits. If `ids` is 0, no tokens are read, and the logits are
    those of the stored outputs.
    """
    threads = a.threads
    tid, n = threads.thread, threads.threads
    tokens, sequences, pool = a.tokens, a.sequences, a.pool_rows
    d, heads, d_key, d_val = a.d_emb, a.heads, a.d_key, a.d_val
    num_layers, vocab, num_read = a.layers, a.vocab, a.num_read
    log_values, per_head = a.log_values != 0, 2 * d_key + d_val
    ids, index = array(a.ids, (tokens,), int64), array(a.index, (sequences,), int64)
    starts = array(a.starts, (sequences + 1,), int64)
    num_retained = a.num_retained
    kept, ends = array(a.kept, (num_retained,), int64), array(a.ends, (sequences,), int64)
    read = array(a.read, (num_read,), int64)
    firsts = sequences if a.previous else 0  # rows after the tokens', for the previous tokens
    x = array(a.x, (tokens, d), float32)
    normed = array(a.normed, (tokens + firsts, d), float32)
    projected = array(a.projected, (tokens + firsts, heads * per_head), float32)
    rank = array(a.rank, (tokens, DECAY_RANK), float32)
    rates = array(a.rates, (tokens, heads * d_key), float32)
    output_gate = array(a.output_gate, (tokens, heads * d_val), float32)
    y = array(a.y, (tokens, heads * d_val), float32)
    gates, gated = array(a.gates, (tokens, 2 * d), float32), array(a.glu, (tokens, d), float32)
    last = array(a.last, (pool, d), float32)
    if not a.ids:
        _unembed(a, last, index, numbers, tid, n)
        return
    h = array(a.h, (pool, d), float64)
    m = array(a.m, (num_layers, pool, heads, d_key), float32)
    z = array(a.z, (num_layers, pool, heads, d_key), float32)
    s = array(a.s, (num_layers, pool, heads, d_key, d_val), float32)
    z_low = array(a.z_low, (num_layers, pool, heads, d_key), int8)
    s_low = array(a.s_low, (num_layers, pool, heads, d_key, d_val), int8)
    n_max = array(a.n, (num_layers, pool, heads if log_values else 0, d_val), float32)
    previous = array(a.previous, (num_layers, pool if firsts else 0, d), float32)
    no_maximum, before = np.empty(0, np.float32), np.empty(per_head, np.float32)
    space = workspace(min(TOGETHER, tokens), d_key, d_val)

    embed = array(a.embed, (vocab, d), embed_numbers)
    for t in range(tid, tokens, n):
        for j in range(d):
            normed[t, j] = number(embed[ids[t], j])
    wait(threads)
    w, scale, bias = weight(a.position, d, 2 * d, numbers)
    product(normed[:tokens], w, scale, bias, gates, False, tid, n)
    wait(threads)
    position(gates, normed[:tokens], starts, h, index, x, tid, n)
    wait(threads)
    table = array(a.layer_table, (num_layers,), LAYER)
    for layer in range(num_layers):
        at = table[layer]
        gain, offset = array(at.norm.gain, (d,), float32), array(at.norm.offset, (d,), float32)
        layer_norm(x, gain, offset, normed, tid, n)
        for i in range(tid, firsts, n):
            normed[tokens + i] = previous[layer, index[i]]
        wait(threads)
        w, scale, bias = weight(at.project, d, heads * per_head, numbers)
        product(normed, w, scale, bias, projected, False, tid, n)
        shifts, decays = at.mix != 0, at.rank.numbers != 0
        is_gated = at.output_gate.numbers != 0
        share = array(at.mix, (heads * per_head if shifts else 0,), float32)
        if is_gated:
            w, scale, bias = weight(at.output_gate, d, heads * d_val, numbers)
            product(normed[:tokens], w, scale, bias, output_gate, False, tid, n)
        if decays:
            w, scale, bias = weight(at.rank, d, DECAY_RANK, numbers)
            product(normed[:tokens], w, scale, bias, rank, False, tid, n)
            wait(threads)
            w, scale, bias = weight(at.rates, DECAY_RANK, heads * d_key, numbers)
            product(rank, w, scale, bias, rates, False, tid, n)
        wait(threads)
        for i in range(tid, firsts, n):
            previous[layer, index[i]] = normed[starts[i + 1] - 1]
        for item in range(sequences * heads):
            i, head = item // heads, item % heads
            place = starts[i] * heads + head * (starts[i + 1] - starts[i])
            if place * n // (tokens * heads) != tid:
                continue  # balance the threads, also for a long prompt
            row, first = index[i], head * per_head
            if head + 1 < heads:
                fetch(s[layer, row, head + 1], s_low[layer, row, head + 1])
            if shifts:
                before[:] = projected[tokens + i, first : first + per_head]
                for t in range(starts[i], starts[i + 1]):
                    mix(
                        projected[t, first : first + per_head],
                        share[first : first + per_head],
                        before,
                    )
            attend(
                head, starts[i], starts[i + 1], projected, rates,
                m[layer, row, head], z[layer, row, head], s[layer, row, head],
                z_low[layer, row, head], s_low[layer, row, head],
                n_max[layer, row, head] if log_values else no_maximum,
                log_values, decays, y, space,
            )  # fmt: skip
            if is_gated:
                columns = slice(head * d_val, (head + 1) * d_val)
                for t in range(starts[i], starts[i + 1]):
                    gate(y[t, columns], output_gate[t, columns])
        wait(threads)
        if layer == num_layers - 1:
            all_x, all_y = x, y
            x = array(a.normed, (num_retained, d), float32)
            y = array(a.projected, (num_retained, heads * d_val), float32)
            for i in range(tid, num_retained, n):
                x[i], y[i] = all_x[kept[i]], all_y[kept[i]]
            gates = array(a.gates, (num_retained, 2 * d), float32)
            gated = array(a.glu, (num_retained, d), float32)
            wait(threads)
        w, scale, bias = weight(at.gate, heads * d_val, 2 * d, numbers)
        product(y, w, scale, bias, gates, False, tid, n)
        wait(threads)
        glu(gates, gated, tid, n)
        wait(threads)
        w, scale, bias = weight(at.merge, d, d, numbers)
        product(gated, w, scale, bias, x, True, tid, n)
        wait(threads)
    for i in range(tid, sequences, n):
        last[index[i]] = x[ends[i]]
    _unembed(a, x, read, numbers, tid, n)


@functools.cache
def forward_function(arithmetic: Arithmetic, embed_dtype: torch.dtype) -> Any:
    """`void f(FORWARD *arguments)` for one weight arithmetic and one dtype of embeddings."""
    numbers, source = arithmetic.numbers, SOURCE
    embeddings = float32 if embed_dtype == torch.float32 else uint16  # bfloat16

    @cfunc(THREAD_FUNCTION, cache=CACHE)
    def run(arguments: Any) -> None:
        if source:
            _forward(carray(arguments, (1,), FORWARD)[0], numbers, embeddings)

    return run
