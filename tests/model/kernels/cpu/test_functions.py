"""Compiled scalar functions against float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.kernels.cpu.functions import exp, jit, log, log1p

Floats = NDArray[np.float32]


def over(function: Any, values: NDArray[Any]) -> Floats:
    """A compiled scalar function applied to many numbers in a loop."""

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
