"""Compiled products against float64."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.kernels.cpu.products import BLOCK, product

Floats = NDArray[np.float32]


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
