"""How code is compiled here, and the functions of one number that it is made of."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, njit, types
from numba.extending import intrinsic

from model.kernels.cpu.compilation import target


def _finds_cache_folder() -> None:
    """For `CACHE`."""


try:
    njit(cache=True)(_finds_cache_folder)
    CACHE = True
except RuntimeError:  # the package's folder is not ours to write, and there is no home
    CACHE = False
"""Whether machine code is kept for the next start; NUMBA_CACHE_DIR says where if need be."""

_FILES = sorted(Path(__file__).parents[2].glob("*/cpu/*.py"))
SOURCE = int.from_bytes(
    hashlib.blake2b(b"".join(path.read_bytes() for path in _FILES), digest_size=7).digest()
)
"""Which source this is. Numba sees a change of the file that a kept function stands in, but not of
those that it calls: kept functions name this number, so that they are compiled again."""

jit = njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
"""Multiply-adds are fused; sums keep their order."""

jit_sum = njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})
"""For sums over one row, in an order that depends on its length alone."""


@intrinsic
def bits(_typing: Any, _value: Any) -> Any:
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda _c, b, _s, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def from_bits(_typing: Any, _value: Any) -> Any:
    """The inverse of `bits`."""
    return types.float32(types.int32), lambda _c, b, _s, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def pointer(_typing: Any, _address: Any) -> Any:
    """An address as a pointer."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def call(_typing: Any, _address: Any) -> Any:
    """Call a C function `int f(void)` by its address."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), [])

    return types.int32(types.int64), build


@intrinsic
def call_with(_typing: Any, _address: Any, _argument: Any) -> Any:
    """Call a C function `void f(void *)` by its address, with an address."""

    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        argument = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [argument]).as_pointer()
        given = builder.inttoptr(args[1], argument)
        builder.call(builder.inttoptr(args[0], function), [given])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def prefetch(_typing: Any, _array: Any) -> Any:
    """Have the cache line in which an array begins come nearer: it will be read and written."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, whole, whole, whole])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        numbers = [ir.Constant(whole, number) for number in (1, 3, 1)]
        builder.call(function, [builder.bitcast(data, place), *numbers])
        return context.get_dummy_value()

    return types.void(_array), build


def _counter(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def count_up(_typing: Any, _address: Any) -> Any:
    """Add 1 to an int64 that several threads share: what it was before. What this thread has
    written before, those see that see the sum."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", _counter(builder, args[0]), one, "seq_cst")

    return types.int64(types.int64), build


@intrinsic
def count(_typing: Any, _address: Any) -> Any:
    """The int64 at an address that `count_up` may change meanwhile."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), build


@intrinsic
def pause(_typing: Any) -> Any:
    """For a loop that waits: leave the core's units to others for a moment."""

    def build(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if target().startswith("x86_64"):
            none = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), none), [])
        return context.get_dummy_value()

    return types.void(), build


SPINS = 500
"""Looks at a counter, for some ten microseconds, before a thread lets others have its core: what it
waits for may be among them."""

FOREVER = 1 << 62
"""Looks at a counter that is sure to reach its target."""


@jit
def until(counter: Any, target: Any, most: Any, rest: Any) -> Any:
    """Wait until the number at an address has reached the target, or after so many looks.

    rest: the address of the function that lets others have the core. Returns whether it has.
    """
    looks = 0
    while count(counter) < target:
        if looks >= most:
            return False
        looks += 1
        if looks > SPINS:
            call(rest)
        else:
            pause()
    return True


@jit
def larger(a: Any, b: Any) -> Any:
    """The maximum, NaN if either is NaN: what is broken must show."""
    return a if a > b or a != a else b


@jit
def exp(x: Any) -> Any:
    """exp in float32, to 2 units of the last place; 0 below -87 (Cephes' polynomial)."""
    x = float32(-104.0) if x < float32(-104.0) else x  # not min and max: NaN stays
    x = float32(88.0) if x > float32(88.0) else x
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
    power = from_bits((max(int32(n), int32(-126)) + int32(127)) << int32(23))
    return float32(0.0) if x < float32(-87.0) else y * power


@jit
def log(x: Any) -> Any:
    """log in float32 of a normal positive number, to 2 units (Cephes' polynomial); NaN of the
    numbers that are none."""
    whole = bits(x)
    e = float32((whole >> int32(23)) - int32(126))
    r = from_bits((whole & int32(0x007FFFFF)) | int32(0x3F000000))
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
    return r + y + e * float32(0.693359375) + (x - x)


@jit
def log1p(x: Any) -> Any:
    """log(1 + x) for 0 <= x <= 1, with the relative precision of float32 also for small x."""
    y = float32(1.0) + x
    return x if y == float32(1.0) else log(y) * (x / (y - float32(1.0)))
