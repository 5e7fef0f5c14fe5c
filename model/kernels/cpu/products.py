"""Products with a weight stored in any of the dtypes, for any number of rows.

A weight `[out, in]` is stored in blocks of 64 outputs, `[out / 64, steps, 64]`, in the order of
reading. Its element type determines its `Arithmetic`, and with that the inputs of a step:

| elements | are | inputs | sums |
|---|---|---|---|
| float32, uint16, int8 | one weight: float32, bfloat16, int8 | unchanged | float32 |
| uint32 | two weights in bfloat16 | rounded to bfloat16 | float32 |
| int32 | four weights of int8, each plus 128 | integers, one scale per row | int32, exact |

Every output is summed over the steps in order, one instruction after another, for any number of
rows or threads: a row's bits do not depend on the batch.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import float32, int32, int64, types, uint32
from numba.extending import intrinsic, overload

from model.kernels.cpu.arithmetic import BY_NUMBERS
from model.kernels.cpu.compilation import features
from model.kernels.cpu.functions import bits, from_bits, jit

BLOCK = 64
"""Outputs of a weight computed together."""

ROWS = 126
"""Rows of the input that stay in cache while a block of the weight is read."""

TALL = 6 if "+avx512f" in features() else 4
"""Rows whose sums over a block stay in registers together; a divisor of `ROWS`."""

PANEL = 512
"""Steps of a block that stay in the L1 cache for all rows."""

LANES = 16
"""Outputs per instruction of an `Arithmetic` that has one."""

binding.initialize_native_asmparser()  # parses the names of instructions

SMALLEST = float32(1e-30)
"""Rows of inputs that are all smaller do not use the full range of int8."""


@intrinsic
def number(_typing: Any, weight: Any) -> Any:
    """A weight stored as float32, bfloat16 (as uint16) or int8, as float32."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _as_numbers(builder, weight, args[0], ir.FloatType(), lambda bits: bits)

    return types.float32(weight), build


@intrinsic
def together(_typing: Any, numbers: Any) -> Any:
    """Number of inputs per step for weights of this type."""

    def build(_context: Any, _builder: Any, _signature: Any, _args: Any) -> Any:
        return ir.Constant(ir.IntType(64), BY_NUMBERS[numbers.dtype].together)

    return types.int64(numbers), build


def _as_numbers(builder: Any, stored_as: Any, value: Any, number_type: Any, many: Any) -> Any:
    """IR for the conversion to float32 of one stored weight or, with `many`, of a vector of
    them."""
    if stored_as == types.uint16:
        wide = many(ir.IntType(32))
        sixteen = 16 if isinstance(wide, ir.IntType) else [16] * BLOCK
        bits = builder.shl(builder.zext(value, wide), ir.Constant(wide, sixteen))
        return builder.bitcast(bits, number_type)
    return builder.sitofp(value, number_type) if stored_as == types.int8 else value


def _multiply(num_rows: int) -> Any:
    """The innermost loop for this many rows: sums `[rows, BLOCK]` += x `[rows, count]` @ block.

    The sums stay in registers, as LLVM vectors, which Numba cannot express in Python. Arrays are
    passed whole, with the offset of the first element and, for x, the row stride.
    """

    @intrinsic
    def multiply(
        _typing: Any, x: Any, _x_at: Any, _stride: Any, block: Any, _block_at: Any,
        _count: Any, sums: Any, _sums_at: Any,
    ) -> Any:  # fmt: skip
        kept_bits = block.dtype.bitwidth
        kept = ir.FloatType() if block.dtype == types.float32 else ir.IntType(kept_bits)
        total = ir.IntType(32) if sums.dtype == types.int32 else ir.FloatType()
        one = ir.FloatType() if x.dtype == types.float32 else ir.IntType(32)
        instruction = BY_NUMBERS[block.dtype].instruction
        width = LANES if instruction else BLOCK
        parts = range(BLOCK // width)
        index, vector = ir.IntType(64), ir.VectorType(total, width)
        repeated, kept_vector = ir.VectorType(one, width), ir.VectorType(kept, width)
        undefined = ir.Constant(repeated, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)

        def build(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            if instruction:
                step = ir.FunctionType(vector, [vector, kept_vector, repeated])
                add_product = ir.InlineAsm(step, f"{instruction} $3, $2, $0", "=v,0,v,v")
            else:
                step = ir.FunctionType(vector, [vector] * 3)
                fma = b.module.declare_intrinsic(f"llvm.fma.v{width}f32", (), step)

            def add(sum_: Any, w: Any, value: Any) -> Any:
                if instruction:
                    return b.call(add_product, [sum_, w, value])
                return b.call(fma, [value, w, sum_])

            def address(array: Any, value: Any, at: Any, kind: Any) -> Any:
                data = context.make_array(array)(context, b, value).data
                return b.bitcast(b.gep(data, [at]), kind.as_pointer())

            def repeat(scalar: Any) -> Any:
                return b.shuffle_vector(
                    b.insert_element(undefined, scalar, index(0)), undefined, zeros
                )

            x_value, x_at, stride, block_value, block_at, count, sums_value, sums_at = args
            rows = range(num_rows)
            places = [
                address(sums, sums_value, b.add(sums_at, index(r * BLOCK + p * width)), vector)
                for r in rows
                for p in parts
            ]
            inputs = [address(x, x_value, b.add(x_at, b.mul(stride, index(r))), one) for r in rows]
            weights = address(block, block_value, block_at, kept_vector)
            first = [b.load(place, align=4) for place in places]
            before, loop, after = (
                b.block, b.append_basic_block("steps"), b.append_basic_block("end"),
            )  # fmt: skip
            b.branch(loop)
            b.position_at_end(loop)
            k, totals = b.phi(index), [b.phi(vector) for _ in places]
            at = b.mul(k, index(len(parts)))
            w = [
                _as_numbers(
                    b, block.dtype,
                    b.load(b.gep(weights, [b.add(at, index(p))]), align=kept_bits // 8),
                    vector, lambda bits: ir.VectorType(bits, width),
                )
                for p in parts
            ]  # fmt: skip
            values = [repeat(b.load(b.gep(inputs[r], [k]))) for r in rows]
            results = [
                add(totals[r * len(parts) + p], w[p], values[r]) for r in rows for p in parts
            ]
            following = b.add(k, index(1))
            k.add_incoming(index(0), before)
            k.add_incoming(following, loop)
            for sum_, start, result in zip(totals, first, results, strict=True):
                sum_.add_incoming(start, before)
                sum_.add_incoming(result, loop)
            b.cbranch(b.icmp_signed("<", following, count), loop, after)
            b.position_at_end(after)
            for result, place in zip(results, places, strict=True):
                b.store(result, place, align=4)
            return context.get_dummy_value()

        return types.void(x, int64, int64, block, int64, int64, sums, int64), build

    return multiply


_tall, _three_rows, _two_rows, _one_row = (_multiply(rows) for rows in (TALL, 3, 2, 1))


def _inputs_for(x: Any, weight: Any) -> Any:
    """The inputs of a product, from rows x `[rows, in]` in float32.

    Returns the rows `[rows, steps]`; their scales, possibly empty; and the initial value of their
    sums.
    """


@overload(_inputs_for, jit_options={"nogil": True, "error_model": "numpy"})
def _choose_inputs(x: Any, weight: Any) -> Any:  # noqa: ARG001
    if weight.dtype == types.uint32:
        return _in_pairs
    return _in_fours if weight.dtype == types.int32 else _as_they_are


def _as_they_are(x: Any, weight: Any) -> Any:  # noqa: ARG001
    return x, np.ones(len(x), np.float32), np.zeros(len(x), np.float32)


@jit
def _rounded(x: Any) -> Any:
    """Bits of a float32 rounded to bfloat16, to nearest even."""
    whole = uint32(bits(x))
    return (whole + uint32(0x7FFF) + ((whole >> uint32(16)) & uint32(1))) >> uint32(16)


def _in_pairs(x: Any, weight: Any) -> Any:
    rows, num_inputs = x.shape
    pairs = np.empty((rows, weight.shape[1]), np.uint32)
    for r in range(rows):
        for i in range(num_inputs // 2):
            pairs[r, i] = _rounded(x[r, 2 * i]) | (_rounded(x[r, 2 * i + 1]) << uint32(16))
        if num_inputs % 2:
            pairs[r, -1] = _rounded(x[r, -1])
    return pairs, np.ones(len(x), np.float32), np.zeros(rows, np.float32)


def _in_fours(x: Any, weight: Any) -> Any:
    rows, num_inputs = x.shape
    fours = np.empty((rows, weight.shape[1]), np.int32)
    scales, starts = np.empty(rows, np.float32), np.empty(rows, np.int32)
    numbers = fours.view(np.int8)
    for r in range(rows):
        top = bits(SMALLEST)
        for i in range(num_inputs):
            top = max(top, bits(x[r, i]) & int32(0x7FFFFFFF))
        largest = from_bits(top)
        total, inverse = int32(0), float32(127.0) / largest
        for i in range(num_inputs):
            value = int32(np.rint(x[r, i] * inverse))
            numbers[r, i] = value
            total += value
        numbers[r, num_inputs:] = 0
        scales[r], starts[r] = largest / float32(127.0), int32(-128) * total
    return fours, scales, starts


def _finish(add: bool) -> Any:
    """out = sums * factor * scale + bias, or out += it, for one row of sums `[BLOCK]`."""

    @intrinsic
    def finish(
        _typing: Any, sums: Any, _sums_at: Any, _factor: Any, scale: Any, bias: Any,
        out: Any, _out_at: Any,
    ) -> Any:  # fmt: skip
        vector = ir.VectorType(ir.FloatType(), BLOCK)
        whole = ir.VectorType(ir.IntType(32), BLOCK)
        zeros, undefined = ir.Constant(whole, [0] * BLOCK), ir.Constant(vector, ir.Undefined)

        def build(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            def address(array: Any, value: Any, at: Any, kind: Any) -> Any:
                data = context.make_array(array)(context, b, value).data
                return b.bitcast(b.gep(data, [at]), kind.as_pointer())

            sums_value, sums_at, factor, scale_value, bias_value, out_value, out_at = args
            zero, is_whole = ir.Constant(ir.IntType(64), 0), sums.dtype == types.int32
            total = b.load(
                address(sums, sums_value, sums_at, whole if is_whole else vector), align=4
            )
            if is_whole:
                total = b.sitofp(total, vector)
                lane = b.insert_element(undefined, factor, ir.Constant(ir.IntType(64), 0))
                total = b.fmul(total, b.shuffle_vector(lane, undefined, zeros))
            total = b.fmul(total, b.load(address(scale, scale_value, zero, vector), align=4))
            total = b.fadd(total, b.load(address(bias, bias_value, zero, vector), align=4))
            place = address(out, out_value, out_at, vector)
            if add:
                total = b.fadd(b.load(place, align=4), total)
            b.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(sums, int64, float32, scale, bias, out, int64), build

    return finish


_finish_row, _finish_and_add = _finish(False), _finish(True)


@jit
def product(
    x: Any, weight: Any, scale: Any, bias: Any, y: Any, add: bool, tid: int, n: int
) -> None:
    """y = x @ weight^T * scale + bias, or y += it.

    x `[rows, in]`, weight `[blocks, steps, BLOCK]`, scale and bias `[out]` or empty,
    y `[rows, out]`.
    """
    rows, num_outputs = y.shape
    num_blocks, steps = weight.shape[:2]
    scales, biases = np.ones(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    last = np.empty(BLOCK, np.float32)
    for top in range(0, rows, ROWS):
        count = min(ROWS, rows - top)
        inputs, factors, starts = _inputs_for(x[top : top + count], weight)
        sums = np.empty((count, BLOCK), starts.dtype)
        for block in range(tid * num_blocks // n, (tid + 1) * num_blocks // n):
            for r in range(count):
                sums[r] = starts[r]
            for k in range(0, steps, PANEL):
                _multiply_panel(inputs, weight, block, k, sums)
            first = block * BLOCK
            width = min(BLOCK, num_outputs - first)
            if len(scale):
                scales[:width] = scale[first : first + width]
            if len(bias):
                biases[:width] = bias[first : first + width]
            for r in range(count):
                at = (top + r) * num_outputs + first
                if width < BLOCK:
                    out = y[top + r, first:]
                    last[:width] = out
                    if add:
                        _finish_and_add(sums, r * BLOCK, factors[r], scales, biases, last, 0)
                    else:
                        _finish_row(sums, r * BLOCK, factors[r], scales, biases, last, 0)
                    out[:] = last[:width]
                elif add:
                    _finish_and_add(sums, r * BLOCK, factors[r], scales, biases, y, at)
                else:
                    _finish_row(sums, r * BLOCK, factors[r], scales, biases, y, at)


@jit
def _multiply_panel(inputs: Any, weight: Any, block: int, k: int, sums: Any) -> None:
    """sums `[rows, BLOCK]` += inputs @ a block, over the `PANEL` steps from k on."""
    count, steps = len(inputs), weight.shape[1]
    depth, at = min(PANEL, steps - k), (block * steps + k) * BLOCK
    r = 0
    while count - r >= TALL:
        _tall(inputs, r * steps + k, steps, weight, at, depth, sums, r * BLOCK)
        r += TALL
    if count - r >= 3:
        _three_rows(inputs, r * steps + k, steps, weight, at, depth, sums, r * BLOCK)
        r += 3
    if count - r == 2:
        _two_rows(inputs, r * steps + k, steps, weight, at, depth, sums, r * BLOCK)
    elif count - r == 1:
        _one_row(inputs, r * steps + k, steps, weight, at, depth, sums, r * BLOCK)
