"""Products with a weight that is kept in any of the dtypes, for any number of rows.

A weight `[out, in]` lies in blocks of 64 outputs, `[out / 64, in, 64]`, in the order in which it is
read. Every output is summed over `in` from first to last, one fused multiply-add after another, in
float32, whatever the number of rows or threads: a row's bits do not depend on its company.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int64, types
from numba.extending import intrinsic

from model.kernels.cpu.functions import jit

BLOCK = 64
"""Outputs of a weight that are computed together."""

ROWS = 128
"""Rows of the input that stay in the cache while a block of the weight passes by."""


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
