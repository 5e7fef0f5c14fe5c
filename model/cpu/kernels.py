"""The arithmetic of a decoding step, compiled by Numba for the CPU that it runs on.

Every function that takes `tid` and `n` does the share of thread `tid` of `n`.

A weight `[out, in]` lies in blocks of 64 outputs, `[out / 64, in, 64]`, in the order in which it is
read. Every output is summed over `in` from first to last, one fused multiply-add after another, in
float32, whatever the number of rows or threads: a row's bits do not depend on its company.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, float64, int8, int32, int64, njit, types
from numba.extending import intrinsic

BLOCK = 64
"""Outputs of a weight that are computed together."""

ROWS = 128
"""Rows of the input that stay in the cache while a block of the weight passes by."""

TINY = 1.1754944e-38
"""The smallest normal float32."""

EXPONENT, FLOOR = 0x7F800000, 0x10000000
"""Bits of a float32's exponent; those of 2^-95, below which no correction is kept."""


def _finds_a_place() -> None:
    """For `CACHE`."""


try:
    njit(cache=True)(_finds_a_place)
    CACHE = True
except RuntimeError:  # the package's folder is not ours to write, and there is no home
    CACHE = False
"""Whether machine code is kept for the next start; NUMBA_CACHE_DIR says where if need be."""

jit = njit(cache=CACHE, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
"""Multiply-adds are fused; sums keep their order."""

jit_sum = njit(
    cache=CACHE, nogil=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"}
)
"""For sums over one row, in an order that depends on its length alone."""


@intrinsic
def _bits(_typing: Any, _value: Any) -> Any:
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda _c, b, _s, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(_typing: Any, _value: Any) -> Any:
    """The inverse of `_bits`."""
    return types.float32(types.int32), lambda _c, b, _s, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def number(_typing: Any, weight: Any) -> Any:
    """A number of a weight, kept as float32, bfloat16 (as uint16) or int8, as float32."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _as_numbers(builder, weight, args[0], ir.FloatType(), lambda bits: bits)

    return types.float32(weight), build


def _as_numbers(builder: Any, kept_as: Any, value: Any, number_type: Any, many: Any) -> Any:
    """IR for the conversion to float32 of one kept number or, with `many`, of a vector of them."""
    if kept_as == types.uint16:
        wide = many(ir.IntType(32))
        sixteen = 16 if isinstance(wide, ir.IntType) else [16] * BLOCK
        bits = builder.shl(builder.zext(value, wide), ir.Constant(wide, sixteen))
        return builder.bitcast(bits, number_type)
    return builder.sitofp(value, number_type) if kept_as == types.int8 else value


def _multiply(num_rows: int) -> Any:
    """The innermost loop, for so many rows: sums `[rows, BLOCK]` += x `[rows, count]` @ block.

    The sums stay in registers, as vectors of LLVM's: that much Numba cannot be told in Python. The
    arrays come whole, with the place of the first element and, for x, the distance of rows.
    """

    @intrinsic
    def multiply(
        _typing: Any, x: Any, _x_at: Any, _stride: Any, block: Any, _block_at: Any,
        _count: Any, sums: Any, _sums_at: Any,
    ) -> Any:  # fmt: skip
        kept = {types.uint16: ir.IntType(16), types.int8: ir.IntType(8)}.get(
            block.dtype, ir.FloatType()
        )
        kept_bytes = block.dtype.bitwidth // 8
        one, index = ir.FloatType(), ir.IntType(64)
        vector, kept_vector = ir.VectorType(one, BLOCK), ir.VectorType(kept, BLOCK)
        undefined = ir.Constant(vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)

        def build(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            fma = b.module.declare_intrinsic(
                f"llvm.fma.v{BLOCK}f32", (), ir.FunctionType(vector, [vector] * 3)
            )

            def address(array: Any, value: Any, at: Any, kind: Any) -> Any:
                data = context.make_array(array)(context, b, value).data
                return b.bitcast(b.gep(data, [at]), kind.as_pointer())

            def repeat(scalar: Any) -> Any:
                return b.shuffle_vector(
                    b.insert_element(undefined, scalar, index(0)), undefined, zeros
                )

            x_value, x_at, stride, block_value, block_at, count, sums_value, sums_at = args
            row = range(num_rows)
            places = [
                address(sums, sums_value, b.add(sums_at, index(r * BLOCK)), vector) for r in row
            ]
            inputs = [address(x, x_value, b.add(x_at, b.mul(stride, index(r))), one) for r in row]
            weights = address(block, block_value, block_at, kept_vector)
            first = [b.load(place, align=4) for place in places]
            before, loop, after = (
                b.block, b.append_basic_block("inputs"), b.append_basic_block("end"),
            )  # fmt: skip
            b.branch(loop)
            b.position_at_end(loop)
            k, totals = b.phi(index), [b.phi(vector) for _ in row]
            w = _as_numbers(
                b, block.dtype, b.load(b.gep(weights, [k]), align=kept_bytes), vector,
                lambda bits: ir.VectorType(bits, BLOCK),
            )  # fmt: skip
            results = [
                b.call(fma, [repeat(b.load(b.gep(inputs[r], [k]))), w, totals[r]]) for r in row
            ]
            following = b.add(k, index(1))
            k.add_incoming(index(0), before)
            k.add_incoming(following, loop)
            for r in row:
                totals[r].add_incoming(first[r], before)
                totals[r].add_incoming(results[r], loop)
            b.cbranch(b.icmp_signed("<", following, count), loop, after)
            b.position_at_end(after)
            for r in row:
                b.store(results[r], places[r], align=4)
            return context.get_dummy_value()

        return types.void(x, int64, int64, block, int64, int64, sums, int64), build

    return multiply


_four_rows, _one_row = _multiply(4), _multiply(1)


@jit
def product(
    x: Any, weight: Any, scale: Any, bias: Any, y: Any, add: bool, tid: int, n: int
) -> None:
    """y = x @ weight^T * scale + bias, or y += it.

    x `[rows, in]`, weight `[blocks, in, BLOCK]`, scale and bias `[out]` or empty, y `[rows, out]`.
    """
    rows, num_inputs = x.shape
    num_blocks, num_outputs = len(weight), y.shape[1]
    sums = np.empty((min(rows, ROWS), BLOCK), np.float32)
    for top in range(0, rows, ROWS):
        count = min(ROWS, rows - top)
        fours = count & ~3
        for block in range(tid * num_blocks // n, (tid + 1) * num_blocks // n):
            sums[:count] = float32(0.0)
            at = block * num_inputs * BLOCK
            for r in range(0, fours, 4):
                x_at = (top + r) * num_inputs
                _four_rows(x, x_at, num_inputs, weight, at, num_inputs, sums, r * BLOCK)
            for r in range(fours, count):
                x_at = (top + r) * num_inputs
                _one_row(x, x_at, num_inputs, weight, at, num_inputs, sums, r * BLOCK)
            first = block * BLOCK
            width = min(BLOCK, num_outputs - first)
            for r in range(count):
                out, total = y[top + r, first : first + width], sums[r]
                if len(scale):
                    for j in range(width):
                        total[j] *= scale[first + j]
                if len(bias):
                    for j in range(width):
                        total[j] += bias[first + j]
                if add:
                    for j in range(width):
                        out[j] += total[j]
                else:
                    for j in range(width):
                        out[j] = total[j]


@jit
def exp(x: Any) -> Any:
    """exp in float32, to 2 units of the last place; 0 below -87 (Cephes' polynomial)."""
    x = min(max(x, float32(-104.0)), float32(88.0))
    n = np.floor(x * float32(1.44269504) + float32(0.5))
    r = x - n * float32(0.693359375)
    r = r + n * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    y = p * r * r + r + float32(1.0)
    power = _from_bits((max(int32(n), int32(-126)) + int32(127)) << int32(23))
    return y * power if x >= float32(-87.0) else float32(0.0)


@jit
def log(x: Any) -> Any:
    """log in float32 of a normal positive number, to 2 units (Cephes' polynomial)."""
    bits = _bits(x)
    e = float32((bits >> int32(23)) - int32(126))
    r = _from_bits((bits & int32(0x007FFFFF)) | int32(0x3F000000))
    small = r < float32(0.70710678)
    e = e - float32(1.0) if small else e
    r = r + r - float32(1.0) if small else r - float32(1.0)
    p = float32(7.0376836292e-2)
    p = p * r + float32(-1.1514610310e-1)
    p = p * r + float32(1.1676998740e-1)
    p = p * r + float32(-1.2420140846e-1)
    p = p * r + float32(1.4249322787e-1)
    p = p * r + float32(-1.6668057665e-1)
    p = p * r + float32(2.0000714765e-1)
    p = p * r + float32(-2.4999993993e-1)
    p = p * r + float32(3.3333331174e-1)
    s = r * r
    y = r * s * p + e * float32(-2.12194440e-4) - float32(0.5) * s
    return r + y + e * float32(0.693359375)


@jit
def log1p(x: Any) -> Any:
    """log(1 + x) for 0 <= x <= 1, with the relative precision of float32 also for small x."""
    y = float32(1.0) + x
    return x if y == float32(1.0) else log(y) * (x / (y - float32(1.0)))


@jit_sum
def _dot(a: Any, b: Any) -> Any:
    total = float32(0.0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@jit_sum
def _mean(x: Any) -> Any:
    total = float32(0.0)
    for j in range(len(x)):
        total += x[j]
    return total / float32(len(x))


@jit_sum
def _variance(x: Any, mean: Any) -> Any:
    total = float32(0.0)
    for j in range(len(x)):
        total += (x[j] - mean) * (x[j] - mean)
    return total / float32(len(x))


@jit
def layer_norm(x: Any, weight: Any, bias: Any, y: Any, tid: int, n: int) -> None:
    """y = (x - mean) / sqrt(variance + 1e-5) * weight + bias; x, y `[rows, d]`."""
    for r in range(tid, len(x), n):
        mean = _mean(x[r])
        inverse = float32(1.0) / np.sqrt(_variance(x[r], mean) + float32(1e-5))
        for j in range(x.shape[1]):
            y[r, j] = (x[r, j] - mean) * inverse * weight[j] + bias[j]


@jit
def glu(x: Any, y: Any, tid: int, n: int) -> None:
    """y `[rows, d]` = x[:, :d] * sigmoid(x[:, d:])."""
    rows, width = y.shape
    first, last = tid * width // n, (tid + 1) * width // n
    for r in range(rows):
        for j in range(first, last):
            y[r, j] = x[r, j] / (float32(1.0) + exp(-x[r, width + j]))


@jit
def position(
    gates: Any, emb: Any, starts: Any, h: Any, index: Any, x: Any, tid: int, n: int
) -> None:
    """h = logaddexp(logsigmoid(a) + h, b) token by token, [a, b] = gates; x = emb + h.

    gates `[tokens, 2 * d]`, emb, x `[tokens, d]`; sequence i has the tokens from starts[i] to
    starts[i + 1], and its h is h[index[i]] of `[pool, d]`, float64, updated in place.
    """
    width = emb.shape[1]
    first, last = tid * width // n, (tid + 1) * width // n
    for i in range(len(index)):
        past = h[index[i]]
        for t in range(starts[i], starts[i + 1]):
            for j in range(first, last):
                a, b = gates[t, j], float64(gates[t, width + j])
                decayed = float64(min(a, float32(0.0)) - log1p(exp(-abs(a)))) + past[j]
                larger = max(decayed, b)
                after = larger + float64(log1p(exp(float32(min(decayed, b) - larger))))
                past[j] = after
                x[t, j] = emb[t, j] + float32(after)


@jit
def _unit(x: Any) -> Any:
    """The 256th part of the last place of x: what `low` counts."""
    return _from_bits(max(_bits(x) & int32(EXPONENT), int32(FLOOR))) * float32(2.0**-31)


@jit
def _lost(before: Any, after: Any, added: Any) -> Any:
    """What `after` = fl(before + added) lacks, in units of `after`."""
    inverse = _from_bits(int32(0x7F000000) - max(_bits(after) & int32(EXPONENT), int32(FLOOR)))
    lost = (added - (after - before)) * inverse * float32(2.0**31)
    # Added to 1.5 * 2^23, a number is rounded to a whole one, which is then the lowest bits.
    whole = min(max(lost, float32(-127.0)), float32(127.0)) + float32(12582912.0)
    return int8(_bits(whole) & int32(0xFF))


@jit
def attend(
    q: Any, k: Any, v: Any, m: Any, z: Any, s: Any, z_low: Any, s_low: Any, n: Any,
    log_values: bool, y: Any, keys: Any, vals: Any,
) -> None:  # fmt: skip
    """`model.attention.step` for one head of one sequence; keys `[3, d_k]`, vals `[3, d_v]`.

    The last two are room for what is computed on the way.
    """
    kept, weight, e = keys[0], keys[1], keys[2]
    kept_v, u, total = vals[0], vals[1], vals[2]
    d_key, d_val = len(q), len(v)
    higher = False
    for j in range(d_key):
        old = m[j]
        new = max(old, np.ceil(k[j]))
        higher |= new != old
        kept[j], weight[j] = exp(old - new), exp(k[j] - new)
        m[j] = new
    for j in range(d_key):
        before = z[j] * kept[j]
        added = float32(z_low[j]) * _unit(before) + weight[j]
        after = before + added
        z_low[j] = _lost(before, after, added)
        z[j] = after
    top = m.max()
    for j in range(d_key):
        e[j] = q[j] + (m[j] - top)
    top = e.max()
    for j in range(d_key):
        e[j] = exp(e[j] - top)
    for i in range(d_val):
        total[i] = float32(0.0)
        if log_values:
            old = n[i]
            new = max(old, np.ceil(v[i]))
            higher |= new != old
            kept_v[i], u[i] = exp(old - new), exp(v[i] - new)
            n[i] = new
        else:
            kept_v[i], u[i] = float32(1.0), v[i]
    if higher:
        for j in range(d_key):
            kept_j, row = kept[j], s[j]
            for i in range(d_val):
                row[i] *= kept_j * kept_v[i]
    for j in range(d_key):
        weight_j, e_j, row, row_low = weight[j], e[j], s[j], s_low[j]
        for i in range(d_val):
            before = row[i]
            added = float32(row_low[i]) * _unit(before) + weight_j * u[i]
            after = before + added
            row_low[i] = _lost(before, after, added)
            row[i] = after
            total[i] += e_j * after
    below = max(_dot(e, z), float32(TINY))
    for i in range(d_val):
        if log_values:
            y[i] = log(max(total[i], float32(TINY))) - log(below) + n[i]
        else:
            y[i] = total[i] / below


@intrinsic
def pointer(_typing: Any, _address: Any) -> Any:
    """An address as a pointer."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def call(_typing: Any, _address: Any) -> Any:
    """Call a C function `int f(void)` by its address; of `void f(void)` the result is noise."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), [])

    return types.int32(types.int64), build
