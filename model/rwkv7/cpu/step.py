"""The whole network for some tokens of some sequences, as one compiled call.

Numba compiles it at its first use and keeps the machine code on disk.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, float32, int64, literally, uint16

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
from model.kernels.cpu.products import BLOCK, number, product
from model.kernels.cpu.rows import norm
from model.kernels.cpu.threads import THREADS
from model.rwkv7.cpu.kernels import shifts, sigmoid, sigmoid_all, square_all, tanh_all, time_mix

NORM = np.dtype([("gain", ADDRESS), ("offset", ADDRESS)])

LOW_RANK = np.dtype([("down", WEIGHT), ("up", WEIGHT)])

LAYER = np.dtype(
    [
        *((name, NORM) for name in ("time_norm", "group_norm", "channel_norm")),
        *((name, ADDRESS) for name in ("shares", "k_k", "k_a", "r_k", "channel_share")),
        *((name, WEIGHT) for name in ("receptance", "key", "value", "output")),
        *((name, LOW_RANK) for name in ("decay", "rate", "first", "gate")),
        *((name, WEIGHT) for name in ("channel_key", "channel_value")),
    ]
)
"""Of a layer. 0 for what it does not have."""

STATE = ("last", "att_shift", "ffn_shift", "wkv")
"""Tensors of a pool."""

SPACE = (
    *("x", "u", "mixed", "r", "k", "v", "v_first", "hidden"),
    *("decay_space", "rate_space", "first_space", "gate_space"),
)
"""Space for what is computed on the way."""

SIZES = (
    *("d_emb", "heads", "layers", "d_ffn", "vocab"),
    *("decay_rank", "rate_rank", "value_rank", "gate_rank"),
)

FORWARD = np.dtype(
    [
        ("threads", THREADS),
        *((name, COUNT) for name in SIZES),
        *((name, COUNT) for name in ("pool_rows", "tokens", "sequences", "num_read")),
        *((name, np.float64) for name in ("norm_eps", "group_norm_eps")),
        *((name, ADDRESS) for name in ("ids", "starts", "owner", "index", "read", "logits")),
        *((name, ADDRESS) for name in (*STATE, *SPACE)),
        ("embed", ADDRESS),
        ("embed_norm", NORM),
        ("norm", NORM),
        ("head", WEIGHT),
        ("layer_table", ADDRESS),
    ]
)
"""Arguments of `forward_function`: numbers, and addresses of arrays."""


@jit
def _norm(at: Any, d: Any) -> Any:
    """Gain and offset."""
    return array(at.gain, (d,), float32), array(at.offset, (d,), float32)


@jit
def _times(at: Any, numbers: Any, x: Any, y: Any, add: bool, tid: int, n: int) -> None:
    """y = x @ weight^T, or y += it, this thread's share; `at` is a WEIGHT."""
    w, scale, bias = weight(at, x.shape[1], y.shape[1], numbers)
    product(x, w, scale, bias, y, add, tid, n)


@jit
def _head(a: Any, x: Any, places: Any, numbers: Any, tid: Any, n: Any) -> None:
    """Logits of some rows of x, in the order of their places; x is not the space named u."""
    count, d = len(places), a.d_emb
    u = array(a.u, (count, d), float32)
    gain, offset = _norm(a.norm, d)
    for i in range(tid, count, n):
        norm(x[places[i]], gain, offset, float32(a.norm_eps), u[i])
    wait(a.threads)
    _times(a.head, numbers, u, array(a.logits, (count, a.vocab), float32), False, tid, n)


@jit
def _forward(a: Any, numbers: Any, small: Any, embed_numbers: Any, size: Any) -> None:
    """Read tokens into states; logits after some of them. All threads run it.

    The tokens of all sequences stand one after another, those of i from starts[i] to starts[i + 1].
    Their products are computed together, and each goes through the state by itself, so it does not
    matter how many come at once. `read` are the tokens that get logits. Where `ids` is 0, no
    sequence reads any, and the logits are those after what was kept in `last`.
    """
    literally(size)
    threads = a.threads
    tid, n = threads.thread, threads.threads
    tokens, sequences, pool = a.tokens, a.sequences, a.pool_rows
    d, heads, layers, d_ffn = a.d_emb, a.heads, a.layers, a.d_ffn
    index, read = array(a.index, (sequences,), int64), array(a.read, (a.num_read,), int64)
    last = array(a.last, (pool, d), float32)
    if not a.ids:
        _head(a, last, index, numbers, tid, n)
        return
    ids, owner = array(a.ids, (tokens,), int64), array(a.owner, (tokens,), int64)
    starts = array(a.starts, (sequences + 1,), int64)
    att_shift = array(a.att_shift, (layers, pool, d), float32)
    ffn_shift = array(a.ffn_shift, (layers, pool, d), float32)
    wkv = array(a.wkv, (layers * pool * heads * size * size,), float32)
    x, u = array(a.x, (tokens, d), float32), array(a.u, (tokens, d), float32)
    mixed = array(a.mixed, (6, tokens, d), float32)
    r, k = array(a.r, (tokens, d), float32), array(a.k, (tokens, d), float32)
    v_first, v_later = array(a.v_first, (tokens, d), float32), array(a.v, (tokens, d), float32)
    hidden = array(a.hidden, (tokens, d_ffn), float32)
    decays = array(a.decay_space, (tokens, a.decay_rank), float32)
    rates = array(a.rate_space, (tokens, a.rate_rank), float32)
    firsts = array(a.first_space, (tokens, a.value_rank), float32)
    gates = array(a.gate_space, (tokens, a.gate_rank), float32)
    eps, group_eps = float32(a.norm_eps), float32(a.group_norm_eps)
    space = np.empty((2, size), np.float32)

    embed = array(a.embed, (a.vocab, d), embed_numbers)
    gain, offset = _norm(a.embed_norm, d)
    for t in range(tid, tokens, n):
        for j in range(d):
            u[t, j] = number(embed[ids[t], j])
        norm(u[t], gain, offset, eps, x[t])
    wait(threads)
    table = array(a.layer_table, (layers,), LAYER)
    for layer in range(layers):
        at = table[layer]
        v = v_later if layer else v_first
        gain, offset = _norm(at.time_norm, d)
        shares = array(at.shares, (6, d), float32)
        shifts(
            x, gain, offset, eps, owner, starts, index, att_shift[layer], shares, u, mixed, tid, n
        )
        wait(threads)
        for i in range(tid, sequences, n):
            att_shift[layer, index[i]] = u[starts[i + 1] - 1]
        _times(at.receptance, numbers, mixed[0], r, False, tid, n)
        _times(at.key, numbers, mixed[2], k, False, tid, n)
        _times(at.value, numbers, mixed[3], v, False, tid, n)
        if tid == 0:
            _times(at.decay.down, float32, mixed[1], decays, False, 0, 1)
            tanh_all(decays)
        if tid == 1 % n:
            _times(at.gate.down, small, mixed[5], gates, False, 0, 1)
            sigmoid_all(gates)
        if tid == 2 % n:
            _times(at.rate.down, small, mixed[4], rates, False, 0, 1)
        if layer and tid == 3 % n:
            _times(at.first.down, small, mixed[3], firsts, False, 0, 1)
        wait(threads)
        w, rate, gate, share, y = mixed[0], mixed[1], mixed[2], mixed[3], mixed[4]
        _times(at.decay.up, float32, decays, w, False, tid, n)
        _times(at.rate.up, small, rates, rate, False, tid, n)
        _times(at.gate.up, small, gates, gate, False, tid, n)
        if layer:
            _times(at.first.up, small, firsts, share, False, tid, n)
        wait(threads)
        k_k, k_a = array(at.k_k, (d,), float32), array(at.k_a, (d,), float32)
        r_k = array(at.r_k, (d,), float32)
        gain, offset = _norm(at.group_norm, d)
        for item in range(sequences * heads):
            i, head = item // heads, item % heads
            place = starts[i] * heads + head * (starts[i + 1] - starts[i])
            if place * n // (tokens * heads) != tid:
                continue  # each thread has as many tokens as the others, also of a long prompt
            h = slice(head * size, (head + 1) * size)
            s_at = ((layer * pool + index[i]) * heads + head) * size * size
            for t in range(starts[i], starts[i + 1]):
                if layer:
                    for j in range(head * size, (head + 1) * size):
                        v[t, j] += (v_first[t, j] - v[t, j]) * sigmoid(share[t, j])
                time_mix(
                    size, wkv, s_at, r[t, h], k[t, h], v[t, h], w[t, h], rate[t, h], gate[t, h],
                    k_k[h], k_a[h], r_k[h], gain[h], offset[h], group_eps, y[t, h], space,
                )  # fmt: skip
        wait(threads)
        _times(at.output, numbers, y, x, True, tid, n)
        wait(threads)
        gain, offset = _norm(at.channel_norm, d)
        shares = array(at.channel_share, (1, d), float32)
        shifts(
            x, gain, offset, eps, owner, starts, index, ffn_shift[layer], shares, u, mixed, tid, n
        )
        wait(threads)
        for i in range(tid, sequences, n):
            ffn_shift[layer, index[i]] = u[starts[i + 1] - 1]
        _times(at.channel_key, numbers, mixed[0], hidden, False, tid, n)
        blocks = (d_ffn + BLOCK - 1) // BLOCK
        first, end = tid * blocks // n * BLOCK, (tid + 1) * blocks // n * BLOCK
        square_all(hidden, first, min(end, d_ffn))
        wait(threads)
        _times(at.channel_value, numbers, hidden, x, True, tid, n)
        wait(threads)
    for i in range(tid, sequences, n):
        last[index[i]] = x[starts[i + 1] - 1]
    _head(a, x, read, numbers, tid, n)


@functools.cache
def forward_function(
    arithmetic: Arithmetic, small: Arithmetic, embed_dtype: torch.dtype, head_size: int
) -> Any:
    """`void f(FORWARD *arguments)` for weights of one kind, low-rank maps, but those of decays, of
    another, and embeddings of a dtype."""
    numbers, low_rank, size, source = arithmetic.numbers, small.numbers, head_size, SOURCE
    embeddings = float32 if embed_dtype == torch.float32 else uint16  # bfloat16

    @cfunc(THREAD_FUNCTION, cache=CACHE)
    def run(arguments: Any) -> None:
        if source:
            _forward(carray(arguments, (1,), FORWARD)[0], numbers, low_rank, embeddings, size)

    return run
