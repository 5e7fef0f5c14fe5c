"""Calls of kernels whose launches `tests.model.kernels.compiled` compiles for a GPU.

Each calls as it is called in serving, and with other strides and addresses of its tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from model.attention import AttentionState
from model.kernels.attention import absorb, chunked, step


def attention(heads: int, d_key: int, d_val: int, *, log_values: bool, compensated: bool) -> None:
    like = torch.zeros(())
    state = AttentionState.empty(4, heads, d_key, d_val, log_values=log_values, like=like)
    if compensated:
        state = replace(state, z_low=state.z.char(), s_low=state.s.char())
    width = 2 * d_key + d_val
    rows = torch.zeros(3, dtype=torch.int32)
    for x in (
        torch.zeros(3, 70, heads, width),
        torch.zeros(3, 200, heads + 1, width + 1)[:, 3:, 1:, 1:],
        torch.zeros(1, 1, heads, width),
    ):
        q, k, v = torch.split(x, [d_key, d_key, d_val], -1)
        step(q[:, 0], k[:, 0], v[:, 0], state, rows)
        chunked(q, k, v, state, rows, rows)
        absorb(k, v, state, rows, rows)


LAUNCHES: dict[str, Callable[[], None]] = {
    "attention of the published model": lambda: attention(
        24, 32, 32, log_values=True, compensated=True
    ),
    "attention of the default model": lambda: attention(
        8, 32, 32, log_values=True, compensated=True
    ),
    "attention of odd heads, linear": lambda: attention(
        3, 24, 40, log_values=False, compensated=True
    ),
    "attention that is not compensated": lambda: attention(
        2, 8, 8, log_values=True, compensated=False
    ),
}
