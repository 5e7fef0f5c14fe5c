"""Compiled row operations against float64."""

import numpy as np
import pytest

from model.kernels.cpu.rows import glu, layer_norm


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_norm_and_gate_are_those_of_the_definition(num_threads: int) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(s, np.float32) for s in ((5, 70), 70, 70))
    x = x * 3 + 2
    normed, gated = np.empty_like(x), np.empty((5, 35), np.float32)
    for thread in range(num_threads):
        layer_norm(x, weight, bias, normed, thread, num_threads)
        glu(x, gated, thread, num_threads)
    exact = x.astype(np.float64)
    scale = np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    expected = (exact - exact.mean(1, keepdims=True)) / scale * weight + bias
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gated, exact[:, :35] / (1 + np.exp(-exact[:, 35:])), rtol=1e-5, atol=1e-6
    )
