"""The update of a head's sums by several tokens."""

from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from model.kernels.cpu.compilation import features
from model.kernels.cpu.functions import jit

EXPONENT, FLOOR = 0x7F800000, 0x10000000
"""Exponent bits of a float32; those of 2^-95, below which there is no compensation."""

ROUND = 1.5 * 2.0**23
"""Added to a small float32, it rounds to an integer, which is then in the lowest bits."""

INVERSE = (0x7F000000 + (31 << 23)) & 0xFFFFFFFF
"""Less the exponent bits of x, those of 2^31 / 2^(exponent of x)."""

KEPT, ADDED, READ = range(3)
"""Parts of `keys` and `vals`: factors of what was there; factors of what is added; factors of what
is read, and what is read."""

LANES = 16 if "+avx512f" in features() else 8 if "+avx2" in features() else 4
"""Numbers of a register."""

ROWS = 4
"""Rows updated together: an addition waits for the one before it, but not for other rows'."""


def _update(rows: int, width: int) -> Any:
    """The innermost loop for part of the sums, `[rows, width]`, from row j and column i on.

    They stay in registers for all tokens, as LLVM vectors, which Numba cannot express in Python.
    """

    @intrinsic
    def update(
        _typing: Any, count: Any, _j: Any, _i: Any, s: Any, s_low: Any, keys: Any, vals: Any,
        higher: Any,
    ) -> Any:  # fmt: skip
        index = ir.IntType(64)
        vector = ir.VectorType(ir.FloatType(), width)
        whole, small = (ir.VectorType(ir.IntType(bits), width) for bits in (32, 8))
        undefined = ir.Constant(vector, ir.Undefined)

        def numbers(value: float) -> Any:
            return ir.Constant(vector, [value] * width)

        def integers(value: int) -> Any:
            return ir.Constant(whole, [value] * width)

        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            num_tokens, j, i = args[:3]
            arrays = [
                context.make_array(kind)(context, b, value)
                for kind, value in zip(signature.args[3:], args[3:], strict=True)
            ]
            s_data, low_data, keys_data, vals_data, higher_data = (each.data for each in arrays)
            _, most, d_key = cgutils.unpack_tuple(b, arrays[2].shape)
            d_val = cgutils.unpack_tuple(b, arrays[3].shape)[2]
            fma = b.module.declare_intrinsic(
                f"llvm.fma.v{width}f32", (), ir.FunctionType(vector, [vector] * 3)
            )

            def address(data: Any, row: Any, columns: Any, column: Any, kind: Any) -> Any:
                place = b.gep(data, [b.add(b.mul(row, columns), column)])
                return b.bitcast(place, kind.as_pointer())

            def of_keys(part: int, t: Any) -> list[Any]:
                """A number for each row, repeated."""
                row = b.add(b.mul(index(part), most), t)
                first = address(keys_data, row, d_key, j, ir.FloatType())
                lanes = [
                    b.insert_element(undefined, b.load(b.gep(first, [index(r)])), index(0))
                    for r in range(rows)
                ]
                return [b.shuffle_vector(lane, undefined, integers(0)) for lane in lanes]

            def of_vals(part: int, t: Any) -> Any:
                """The address of the numbers of the columns."""
                return address(vals_data, b.add(b.mul(index(part), most), t), d_val, i, vector)

            def exponent(row: Any) -> Any:
                found = b.and_(b.bitcast(row, whole), integers(EXPONENT))
                return b.select(b.icmp_signed(">", found, integers(FLOOR)), found, integers(FLOOR))

            def add(row: Any, exponent_row: Any, low: Any, weight: Any, value: Any) -> Any:
                """The row after an addition, its exponent, and what was lost, plus `ROUND`."""
                unit = b.fmul(b.bitcast(exponent_row, vector), numbers(2.0**-31))
                lost_before = b.fmul(b.fsub(low, numbers(ROUND)), unit)
                added = b.call(fma, [weight, value, lost_before])
                after = b.fadd(row, added)
                exponent_after = exponent(after)
                inverse = b.bitcast(b.sub(integers(INVERSE), exponent_after), vector)
                lost = b.fmul(b.fsub(added, b.fsub(after, row)), inverse)
                for sign, limit in ((">", numbers(-127.0)), ("<", numbers(127.0))):
                    lost = b.select(b.fcmp_ordered(sign, lost, limit), lost, limit)
                return after, exponent_after, b.fadd(lost, numbers(ROUND))

            places = [b.add(j, index(r)) for r in range(rows)]
            rows_at = [address(s_data, place, d_val, i, vector) for place in places]
            lows_at = [address(low_data, place, d_val, i, small) for place in places]
            first_rows = [b.load(at, align=4) for at in rows_at]
            first_lows = [
                b.fadd(b.sitofp(b.load(at, align=1), vector), numbers(ROUND)) for at in lows_at
            ]
            first_exponents = [exponent(row) for row in first_rows]
            before = b.block
            tokens, scale, advance, end = (
                b.append_basic_block(name) for name in ("tokens", "scale", "advance", "end")
            )
            b.branch(tokens)

            b.position_at_end(tokens)
            t = b.phi(index)
            last_rows, last_lows = ([b.phi(vector) for _ in places] for _ in range(2))
            last_exponents = [b.phi(whole) for _ in places]
            changed = b.load(b.gep(higher_data, [t]))
            b.cbranch(b.icmp_unsigned("!=", changed, changed.type(0)), scale, advance)

            b.position_at_end(scale)
            kept = b.load(of_vals(KEPT, t), align=4)
            scaled_rows = [
                b.fmul(row, b.fmul(factor, kept))
                for row, factor in zip(last_rows, of_keys(KEPT, t), strict=True)
            ]
            scaled_exponents = [exponent(row) for row in scaled_rows]
            b.branch(advance)

            b.position_at_end(advance)
            now_rows, now_exponents = (
                [b.phi(vector) for _ in places],
                [b.phi(whole) for _ in places],
            )
            for phis, unchanged, scaled in (
                (now_rows, last_rows, scaled_rows),
                (now_exponents, last_exponents, scaled_exponents),
            ):
                for phi, *values in zip(phis, unchanged, scaled, strict=True):
                    for value, block in zip(values, (tokens, scale), strict=True):
                        phi.add_incoming(value, block)
            value = b.load(of_vals(ADDED, t), align=4)
            sums = [
                add(row, exponent_row, low, weight, value)
                for row, exponent_row, low, weight in zip(
                    now_rows, now_exponents, last_lows, of_keys(ADDED, t), strict=True
                )
            ]
            read_at = of_vals(READ, t)
            read = b.load(read_at, align=4)
            for factor, (row, _, _) in zip(of_keys(READ, t), sums, strict=True):
                read = b.call(fma, [factor, row, read])
            b.store(read, read_at, align=4)
            following = b.add(t, index(1))
            later_rows, later_exponents, later_lows = zip(*sums, strict=True)
            for phis, first, later in (
                ([t], [index(0)], [following]),
                (last_rows, first_rows, later_rows),
                (last_exponents, first_exponents, later_exponents),
                (last_lows, first_lows, later_lows),
            ):
                for phi, *values in zip(phis, first, later, strict=True):
                    for value, block in zip(values, (before, advance), strict=True):
                        phi.add_incoming(value, block)
            b.cbranch(b.icmp_signed("<", following, num_tokens), tokens, end)

            b.position_at_end(end)
            for at, row in zip(rows_at, later_rows, strict=True):
                b.store(row, at, align=4)
            for at, low in zip(lows_at, later_lows, strict=True):
                b.store(b.trunc(b.bitcast(low, whole), small), at, align=1)
            return context.get_dummy_value()

        return types.void(count, int64, int64, s, s_low, keys, vals, higher), build

    return update


_update_block, _update_row, _update_number = _update(ROWS, LANES), _update(1, LANES), _update(1, 1)


@jit
def update(count: int, s: Any, s_low: Any, keys: Any, vals: Any, higher: Any) -> None:
    """Add `count` tokens to the sums s `[d_k, d_v]`, and read the sums after each.

    keys `[3, tokens, d_k]`, vals `[3, tokens, d_v]`. For each token t in order:

        s *= keys[KEPT, t]^T vals[KEPT, t]     if higher[t]
        s += keys[ADDED, t]^T vals[ADDED, t]
        vals[READ, t] = keys[READ, t] @ s

    The additions are compensated: s_low `[d_k, d_v]` keeps what rounding lost, in 1/256 ulp. The
    bits do not depend on how many tokens are added together.
    """
    d_key, d_val = s.shape
    whole = d_val - d_val % LANES
    vals[READ, :count] = 0
    for i in range(0, whole, LANES):
        j = 0
        while d_key - j >= ROWS:
            _update_block(count, j, i, s, s_low, keys, vals, higher)
            j += ROWS
        while j < d_key:
            _update_row(count, j, i, s, s_low, keys, vals, higher)
            j += 1
    for i in range(whole, d_val):
        for j in range(d_key):
            _update_number(count, j, i, s, s_low, keys, vals, higher)
