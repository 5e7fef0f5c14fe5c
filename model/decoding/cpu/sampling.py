"""Drawing tokens on a CPU, and finding the most probable ones, compiled."""

import functools
from typing import Any

import numpy as np
from numba import float32, float64, int32, int64, njit

from model.kernels.cpu.functions import CACHE, SOURCE, bits, exp, from_bits, jit, jit_sum

PART = 1024
"""Tokens per partial sum of weights."""


@jit
def _ordered(whole: Any) -> Any:
    """The bits of a float32 as a number in the order of the floats, and back."""
    return whole ^ ((whole >> int32(31)) & int32(0x7FFFFFFF))


@jit
def _largest(row: Any) -> Any:
    top = _ordered(bits(row[0]))
    for j in range(len(row)):
        top = max(top, _ordered(bits(row[j])))
    return from_bits(_ordered(top))


@jit_sum
def _total(weights: Any) -> Any:
    total = 0.0
    for j in range(len(weights)):
        total += float64(weights[j])
    return total


EXPONENT, DIGIT = 52, 10
"""The position of the exponent in a float64, and the bits examined per pass."""

NONE = -1
UNCERTAIN = -2
"""Instead of a token."""


@jit
def _draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
    count = logits.shape[1]
    weights = np.empty(count, np.float32)
    sums = np.empty((count + PART - 1) // PART, np.float64)
    for r in range(len(logits)):
        row, top = logits[r], float64(_largest(logits[r]))
        for j in range(count):
            weights[j] = exp(float32((float64(row[j]) - top) / temperatures[r]))
        total = 0.0
        for part in range(len(sums)):
            sums[part] = _total(weights[part * PART : (part + 1) * PART])
            total += sums[part]
        if not 0.0 < total < np.inf:
            chosen[r] = NONE
            continue
        target = min(points[r] * total, total * (1.0 - 2.0**-52))
        below, part = 0.0, 0
        while below + sums[part] <= target:
            below += sums[part]
            part += 1
        for j in range(part * PART, min((part + 1) * PART, count)):
            if weights[j] > float32(0.0):
                chosen[r] = j
                below += float64(weights[j])
                if below > target:
                    break


@jit
def _cut(weights: Any, keys: Any, held: Any, held_keys: Any, top_k: Any, target: Any) -> Any:
    """Find the `top_k` largest weights, or the fewest whose sum reaches `target`.

    A radix search: non-negative floats are ordered like their bits, `keys`. The result is all
    weights above a limit and some that equal it. Returns the limit, the number of weights equal to
    it that are included, and the number and the sum of the larger ones; the limit is -1 if all
    weights do not suffice.
    """
    counts, sums = np.empty(1 << DIGIT, np.int64), np.empty(1 << DIGIT)
    n, shift, larger, total = len(weights), EXPONENT, 0, 0.0
    values, bits = weights, keys
    while True:
        counts[:] = 0
        sums[:] = 0.0
        for i in range(n):
            digit = (bits[i] >> shift) & ((1 << DIGIT) - 1)
            counts[digit] += 1
            sums[digit] += values[i]
        digit = (1 << DIGIT) - 1
        while digit >= 0 and larger + counts[digit] < top_k and total + sums[digit] < target:
            larger += counts[digit]
            total += sums[digit]
            digit -= 1
        if digit < 0:
            return -1.0, 0, larger, total
        found = 0
        for i in range(n):
            if (bits[i] >> shift) & ((1 << DIGIT) - 1) == digit:
                held[found] = values[i]
                found += 1
        values, bits, n = held, held_keys, found
        if shift == 0 or n == 1:
            break
        shift = max(shift - DIGIT, 0)
    limit, among = values[0], 0
    while among < n and larger + among < top_k and total + among * limit < target:
        among += 1
    return limit, among, larger, total


@jit
def _draw_filtered(
    weights: Any, keys: Any, filters: Any, ends: Any, points: Any, chosen: Any
) -> None:
    vocab = weights.shape[1]
    held, ids = np.empty(vocab), np.empty(vocab, np.int64)
    held_keys = held.view(np.int64)
    for r in range(len(weights)):
        row, top_k, top_p, min_p = weights[r], filters[r, 0], filters[r, 1], filters[r, 2]
        total = 0.0
        for j in range(vocab):
            total += row[j]
        if not total >= 1.0:  # NaN
            chosen[r] = NONE
            continue
        limit, among = ends[r, 0], int64(ends[r, 1])
        if among == 0 and 0 < top_k < vocab:
            limit, among, _, above = _cut(row, keys[r], held, held_keys, top_k, np.inf)
            total = above + among * limit
        if ends[r, 1] == 0.0 and top_p < 1.0:
            target, error = top_p * total, total * vocab * 2.0**-50
            limit, among, larger, above = _cut(row, keys[r], held, held_keys, np.inf, target)
            before = above + (among - 1) * limit
            is_first = larger + among == 1  # it stays whatever top_p is
            if before + limit < target + error or (before > target - error and not is_first):
                chosen[r] = UNCERTAIN
                continue
        n, cumulative = 0, 0.0
        for j in range(vocab):
            weight = row[j]
            if weight > limit or (weight == limit and among > 0):
                among -= weight == limit
                if weight > 0.0 and weight >= min_p:
                    cumulative += weight
                    held[n], ids[n] = cumulative, j
                    n += 1
        target = min(points[r] * cumulative, cumulative * (1.0 - 2.0**-52))
        j = 0
        while held[j] <= target:
            j += 1
        chosen[r] = ids[j]


@jit
def _find_largest(logits: Any, ids: Any, values: Any) -> None:
    for r in range(len(logits)):
        row, found = logits[r], 0
        for j in range(len(row)):
            value = row[j]
            if found == len(ids[r]):
                if not value > values[r, found - 1]:
                    continue
                place = found - 1
            else:
                place = found
                found += 1
            while place > 0 and value > values[r, place - 1]:
                values[r, place], ids[r, place] = values[r, place - 1], ids[r, place - 1]
                place -= 1
            values[r, place], ids[r, place] = value, j


@functools.cache
def draw_function() -> Any:
    """`draw(logits, temperatures, points, chosen)`: inverse transform sampling of softmax(logits /
    t).

    logits `[rows, vocab]` float32, temperatures t > 0 and points in [0, 1) `[rows]` float64; chosen
    `[rows]` int64 receives a token id per row. Sums are float64. The id is -1 for rows with NaN or
    inf, and where every weight is 0.
    """
    source = SOURCE

    @njit(cache=CACHE, nogil=True)
    def draw(logits: Any, temperatures: Any, points: Any, chosen: Any) -> None:
        if source:
            _draw(logits, temperatures, points, chosen)

    return draw


@functools.cache
def draw_filtered_function() -> Any:
    """`draw(weights, keys, filters, ends, points, chosen)`: from the largest weights of each row.

    weights `[rows, vocab]` float64, of which the largest is 1, and their bits, int64; top_k, of
    which 0 stands for none, top_p and min_p of each row `[rows, 3]` float64; the rest as in
    `draw_function`. ends `[rows, 2]` float64: the smallest of the weights that top_k and top_p
    leave, and how many are left of those that are equal to it; or -1 and 0 to have that found. The
    token is `UNCERTAIN` where the order in which weights are summed could decide it.
    """
    source = SOURCE

    @njit(cache=CACHE, nogil=True)
    def draw(weights: Any, keys: Any, filters: Any, ends: Any, points: Any, chosen: Any) -> None:
        if source:
            _draw_filtered(weights, keys, filters, ends, points, chosen)

    return draw


@functools.cache
def largest_function() -> Any:
    """`largest(logits, ids, values)`: the largest logits of each row and their ids, the largest
    first, of equal ones the lower id.

    logits `[rows, vocab]` float32; ids int64 and values float32 `[rows, count]`, count up to vocab.
    Good for small counts. A row with NaN has anything.
    """
    source = SOURCE

    @njit(cache=CACHE, nogil=True)
    def largest(logits: Any, ids: Any, values: Any) -> None:
        if source:
            _find_largest(logits, ids, values)

    return largest
