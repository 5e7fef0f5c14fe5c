"""Compiled products against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model import WeightDtype
from model.kernels.cpu import arithmetic
from model.kernels.cpu.arithmetic import FLOAT32, NARROW, Arithmetic
from model.kernels.cpu.compilation import features
from model.kernels.cpu.products import ROWS, TALL, product
from model.kernels.linear import PackedLinear, narrow

Floats = NDArray[np.float32]
HERE = [a for a in FLOAT32 + NARROW if a.feature in {"", *features()}]
each_arithmetic = pytest.mark.parametrize(
    "kind",
    [HERE[0], *(pytest.param(kind, marks=pytest.mark.long) for kind in HERE[1:])],
    ids=lambda kind: kind.name,
)
"""Each takes seconds to compile."""


def packed(weight: Floats, kind: Arithmetic) -> PackedLinear:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "features", lambda: [kind.feature])
        made = PackedLinear(torch.from_numpy(weight), None, kind.weights)
    assert made.arithmetic == kind
    return made


def numbers(made: PackedLinear) -> NDArray[np.generic]:
    """The packed weight, `[blocks, steps, BLOCK]`."""
    width = made.arithmetic.stored.itemsize * made.arithmetic.together
    whole = made.weight.flatten(2).view(torch.uint8).numpy()
    return whole.view(f"u{width}" if made.arithmetic.weights != "float32" else "f4").view(
        made.arithmetic.numbers.name
    )


def rounded(values: Floats, dtype: WeightDtype) -> NDArray[np.float64]:
    """Rounded rows of inputs, by definition."""
    exact = torch.from_numpy(values)
    if dtype == "bfloat16":
        exact = exact.bfloat16()
    if dtype == "int8":
        largest = exact.abs().amax(1, keepdim=True).clamp(min=1e-30)
        whole = (exact * torch.div(torch.tensor(127.0), largest)).round()  # not its reciprocal
        return (whole.double() * largest.double() / 127).numpy()
    return exact.double().numpy()


@each_arithmetic
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, TALL + 1, 8, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5]),
    num_inputs=st.sampled_from([1, 2, 3, 5, 64, 257, 1100]),
    num_outputs=st.sampled_from([1, 2, 63, 64, 65, 200]),
    biased=st.booleans(),
    add=st.booleans(),
    num_threads=st.integers(1, 3),
)
def test_a_product_is_one_whatever_the_sizes_and_the_threads(
    kind: Arithmetic,
    rows: int,
    num_inputs: int,
    num_outputs: int,
    biased: bool,
    add: bool,
    num_threads: int,
) -> None:
    random = np.random.default_rng(rows * num_inputs * num_outputs)
    x, weight = (random.standard_normal((n, num_inputs), np.float32) for n in (rows, num_outputs))
    bias = random.random(num_outputs if biased else 0, np.float32)
    before = random.standard_normal((rows, num_outputs), np.float32)
    made = packed(weight, kind)
    scale = np.empty(0, np.float32) if made.scale is None else made.scale.numpy()
    y = before.copy()
    for thread in range(num_threads):
        product(x, numbers(made), scale, bias, y, add, thread, num_threads)
    narrowed, unit = narrow(torch.from_numpy(weight), kind.weights)
    exact = narrowed.double() * (1 if unit is None else unit.double().unsqueeze(1))
    expected = rounded(x, kind.inputs) @ exact.numpy().T
    expected += (bias if biased else 0) + (before if add else 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for row in (0, rows // 2, rows - 1):
        alone = before[row : row + 1].copy()
        product(x[row : row + 1].copy(), numbers(made), scale, bias, alone, add, 0, 1)
        assert np.array_equal(alone[0], y[row])


@each_arithmetic
def test_rows_of_any_size_give_finite_results(kind: Arithmetic) -> None:
    sizes = np.array([0, 1e-45, 1e-38, 1e-31, 1e-20, 1, 1e20, 1e30], np.float32)
    x = sizes[:, None] * np.linspace(-1, 1, 41, dtype=np.float32)
    weight = np.random.default_rng(0).standard_normal((70, 41), np.float32)
    y = packed(weight, kind)(torch.from_numpy(x)).numpy()
    assert np.isfinite(y).all()
    assert (y[0] == 0).all()
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    error = np.abs(y - expected).max(1) / np.maximum(np.abs(expected).max(1), 1e-30)
    assert (error < {"float32": 2e-2, "bfloat16": 2e-2, "int8": 4e-2}[kind.weights]).all()


def test_int8_sums_of_the_largest_numbers_are_exact() -> None:
    found = [a for a in HERE if a.inputs == "int8"]
    if not found:
        pytest.skip("needs VPDPBUSD")
    [kind] = found
    x = np.full((3, 20_000), 2.0, np.float32)
    x[1], x[2, ::2] = -2.0, -2.0
    weight = np.full((2, 20_000), 127.0, np.float32)
    weight[1] = -127.0
    y = packed(weight, kind)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-6)
