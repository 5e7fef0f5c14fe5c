"""The number of prompt tokens per step follows the measured times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.pace import Pace


def run(pace: Pace, fixed_s: float, token_s: float, count: int) -> float:
    """Steps that read as much as allowed, at least 16 tokens; returns the duration of the last
    one."""
    step_s = 0.0
    for _ in range(count):
        num_tokens = max(16, pace.tokens)
        step_s = fixed_s + token_s * num_tokens
        pace.observe(num_tokens, step_s)
    return step_s


@given(fixed_s=st.floats(0.0, 0.06), token_s=st.floats(1e-5, 1e-3))
def test_steps_become_as_long_as_they_may_be(fixed_s: float, token_s: float) -> None:
    pace = Pace(0.1)
    assert run(pace, fixed_s, token_s, 40) == pytest.approx(0.1, abs=0.01)
    assert run(pace, fixed_s / 2, token_s * 4, 40) <= 0.1 + 16 * token_s * 4
    assert run(pace, fixed_s, token_s, 40) == pytest.approx(0.1, abs=0.01)


def test_a_single_slow_step_costs_half_of_the_budget_at_most() -> None:
    pace = Pace(0.1)
    pace.observe(100, 0.1)
    pace.observe(100, 10.0)
    assert pace.tokens == 50
    pace.observe(50, 0.05)
    assert pace.tokens == 100


def test_a_short_prompt_says_nothing_about_how_many_tokens_are_too_many() -> None:
    pace = Pace(0.1)
    pace.observe(512, 0.5)
    assert pace.tokens == 102
    pace.observe(7, 0.03)
    assert pace.tokens == 102


def test_the_first_measured_step_decides() -> None:
    assert Pace(0.1).tokens == 0
    pace = Pace(0.1)
    pace.observe(512, 0.005)
    assert pace.tokens == 10_240
