"""The compiled arithmetic against float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.cpu.kernels import BLOCK, exp, glu, jit, layer_norm, log, log1p, product

Floats = NDArray[np.float32]


def over(function: Any, values: NDArray[Any]) -> Floats:
    """A compiled function of one number on many, as loops use it."""

    @jit
    def loop(x: Any, y: Any) -> None:
        for i in range(len(x)):
            y[i] = function(x[i])

    x = values.astype(np.float32)
    y = np.empty_like(x)
    loop(x, y)
    return y


@pytest.mark.parametrize(
    ("function", "reference", "values"),
    [
        (exp, np.exp, np.linspace(-86.9, 87.9, 50_001)),
        (log, np.log, np.exp(np.linspace(-87, 88, 50_001))),
        (log1p, np.log1p, np.exp(np.linspace(-80, 0, 50_001))),
    ],
)
def test_functions_are_exact_to_a_few_units(
    function: Any, reference: Callable[[Any], Any], values: NDArray[np.float64]
) -> None:
    values = values.astype(np.float32).astype(np.float64)
    expected = reference(values)
    found = over(function, values)
    assert np.abs(found - expected).max(where=np.abs(expected) < 1, initial=0) < 3e-7
    assert (np.abs(found - expected) <= 3e-7 * np.abs(expected) + 1e-10).mean() > 0.999


def test_exp_of_what_is_far_below_is_zero_and_of_zero_one() -> None:
    assert over(exp, np.array([-88.0, -1e30, -np.inf, 0.0])).tolist() == [0, 0, 0, 1]
    assert np.isfinite(over(exp, np.array([1e30]))).all()


def packed(weight: Floats) -> Floats:
    """`[out, in]` in blocks."""
    blocks = -(-len(weight) // BLOCK)
    padded = np.zeros((blocks * BLOCK, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK, weight.shape[1]).transpose(0, 2, 1))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 261]),
    num_inputs=st.sampled_from([1, 2, 3, 5, 64, 257]),
    num_outputs=st.sampled_from([1, 2, 63, 64, 65, 200]),
    scaled=st.booleans(),
    biased=st.booleans(),
    add=st.booleans(),
    team=st.integers(1, 3),
)
def test_a_product_is_one_whatever_the_sizes_and_the_threads(
    rows: int, num_inputs: int, num_outputs: int, scaled: bool, biased: bool, add: bool, team: int
) -> None:
    random = np.random.default_rng(rows * num_inputs * num_outputs)
    x, weight = (random.standard_normal((n, num_inputs), np.float32) for n in (rows, num_outputs))
    scale = random.random(num_outputs if scaled else 0, np.float32)
    bias = random.random(num_outputs if biased else 0, np.float32)
    before = random.standard_normal((rows, num_outputs), np.float32)
    y = before.copy()
    for thread in range(team):
        product(x, packed(weight), scale, bias, y, add, thread, team)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    expected = expected * (scale if scaled else 1) + (bias if biased else 0)
    expected += before if add else 0
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    alone = before[-1:].copy()
    product(x[-1:].copy(), packed(weight), scale, bias, alone, add, 0, 1)
    assert np.array_equal(alone[0], y[-1])


@pytest.mark.parametrize("team", [1, 2, 3])
def test_norm_and_gate_are_those_of_the_definition(team: int) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(s, np.float32) for s in ((5, 70), 70, 70))
    x = x * 3 + 2
    normed, gated = np.empty_like(x), np.empty((5, 35), np.float32)
    for thread in range(team):
        layer_norm(x, weight, bias, normed, thread, team)
        glu(x, gated, thread, team)
    exact = x.astype(np.float64)
    scale = np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    expected = (exact - exact.mean(1, keepdims=True)) / scale * weight + bias
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gated, exact[:, :35] / (1 + np.exp(-exact[:, 35:])), rtol=1e-5, atol=1e-6
    )
