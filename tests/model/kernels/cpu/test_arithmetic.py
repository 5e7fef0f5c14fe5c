"""The processor's instructions determine the arithmetic of matrix products."""

import pytest

from model import WeightDtype
from model.kernels.cpu import arithmetic
from model.kernels.cpu.arithmetic import arithmetic_for
from tests.model.kernels.cpu.test_compilation import set_processor

X86, ALL = "x86_64-unknown-linux-gnu", "+fma,+avx512f,+avx512bf16,+avx512vnni"


@pytest.mark.parametrize(
    ("features", "weights", "name"),
    [
        (ALL, "float32", "float32 x float32"),
        (ALL, "bfloat16", "bfloat16 x bfloat16"),
        (ALL, "int8", "int8 x int8"),
        ("+fma,+avx512f,-avx512bf16,+avx512vnni", "bfloat16", "bfloat16 x float32"),
        ("+fma,+avx512f,-avx512bf16,+avx512vnni", "int8", "int8 x int8"),
        ("+fma,+avx2", "bfloat16", "bfloat16 x float32"),
        ("+fma,+avx2", "int8", "int8 x float32"),
        ("", "float32", "float32 x float32"),
    ],
)
def test_weights_are_multiplied_in_their_own_type_where_the_processor_does_it(
    features: str, weights: WeightDtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_processor(monkeypatch, X86, features)
    assert arithmetic_for(weights).name == name


def test_compiled_code_distinguishes_them_by_number() -> None:
    every = arithmetic.FLOAT32 + arithmetic.NARROW
    assert len({a.name for a in every}) == len(arithmetic.BY_NUMBERS) == len(every)
    assert all(a.numbers.bitwidth == 8 * a.stored.itemsize * a.together for a in every)
