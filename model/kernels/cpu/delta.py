"""The delta rule: a token's update of a state matrix, and its output."""

from typing import Any

from llvmlite import ir
from numba import float32, int64, types
from numba.core import errors
from numba.extending import intrinsic


@intrinsic(prefer_literal=True)
def delta_rule(
    _typing: Any,
    size: Any,
    s: Any,
    _s_at: Any,
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    y: Any,
) -> Any:
    """s = diag(w) s + b (s^T a)^T + k v^T; y = s^T r, for s `[size, size]` at an offset.

    Of the vectors `[size]`, each contiguous, v and y belong to the columns of s. Rows of s stay in
    registers, as LLVM vectors, which Numba cannot express in Python. Sums run from the first row to
    the last.
    """
    if not isinstance(size, types.IntegerLiteral):
        raise errors.RequireLiteralValue("the size of the state is a constant")
    width = size.literal_value
    one, index = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(one, width)
    undefined = ir.Constant(vector, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    nothing = ir.Constant(vector, [0.0] * width)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fma = builder.module.declare_intrinsic(
            f"llvm.fma.v{width}f32", (), ir.FunctionType(vector, [vector] * 3)
        )

        def address(place: int, kind: Any) -> Any:
            data = context.make_array(signature.args[place])(context, builder, args[place]).data
            return builder.bitcast(data, kind.as_pointer())

        def repeat(numbers: Any, j: Any) -> Any:
            scalar = builder.load(builder.gep(numbers, [j]))
            first = builder.insert_element(undefined, scalar, index(0))
            return builder.shuffle_vector(first, undefined, zeros)

        def loop(start: Any, step: Any) -> Any:
            """The sum of a vector over all rows: `step` computes the next one from a row and the
            last."""
            before = builder.block
            body, after = builder.append_basic_block("rows"), builder.append_basic_block("end")
            builder.branch(body)
            builder.position_at_end(body)
            j, total = builder.phi(index), builder.phi(vector)
            following, result = builder.add(j, index(1)), step(j, total)
            for phi, first, later in ((j, index(0), following), (total, start, result)):
                phi.add_incoming(first, before)
                phi.add_incoming(later, body)
            builder.cbranch(builder.icmp_signed("<", following, index(width)), body, after)
            builder.position_at_end(after)
            return result

        matrix = builder.bitcast(builder.gep(address(1, one), [args[2]]), vector.as_pointer())
        r, w, k, a, b = (address(place, one) for place in (3, 4, 5, 7, 8))
        v = builder.load(address(6, vector), align=4)

        def remove(j: Any, total: Any) -> Any:
            row = builder.load(builder.gep(matrix, [j]), align=4)
            return builder.call(fma, [row, repeat(a, j), total])

        removed = loop(nothing, remove)

        def advance(j: Any, total: Any) -> Any:
            place = builder.gep(matrix, [j])
            added = builder.call(fma, [removed, repeat(b, j), builder.fmul(v, repeat(k, j))])
            row = builder.call(fma, [builder.load(place, align=4), repeat(w, j), added])
            builder.store(row, place, align=4)
            return builder.call(fma, [row, repeat(r, j), total])

        builder.store(loop(nothing, advance), address(9, vector), align=4)
        return context.get_dummy_value()

    arrays = (r, w, k, v, a, b, y)
    if not all(isinstance(each, types.Array) and each.dtype == float32 for each in (s, *arrays)):
        raise errors.TypingError("states and vectors are arrays of float32")
    return types.void(size, s, int64, *arrays), build
