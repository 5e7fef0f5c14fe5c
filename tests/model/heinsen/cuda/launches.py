"""Calls of kernels whose launches `tests.model.kernels.cuda.compiled` compiles for a GPU.

Each call is made as in serving, and with other strides and addresses of its tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from model import WeightDtype
from model.decoding.cuda.inputs import resolve_inputs
from model.decoding.cuda.sampling import choose
from model.decoding.cuda.table import SamplerTable
from model.heinsen.attention import AttentionState
from model.heinsen.cuda import position as recurrence
from model.heinsen.cuda.attention import absorb, chunked, step
from model.kernels.cuda.linear import linear
from model.kernels.cuda.rows import write_rows
from model.kernels.linear import narrow


def attention(
    heads: int, d_key: int, d_val: int, *, log_values: bool, compensated: bool, decay: bool = False
) -> None:
    like = torch.zeros(())
    state = AttentionState.empty(4, heads, d_key, d_val, log_values=log_values, like=like)
    if compensated:
        state = replace(state, z_low=state.z.char(), s_low=state.s.char())
    width = 2 * d_key + d_val
    for x in (
        torch.zeros(3, 70, heads, width),
        torch.zeros(3, 200, heads + 1, width + 1)[:, 3:, 1:, 1:],
        torch.zeros(1, 1, heads, width),
    ):
        q, k, v = torch.split(x, [d_key, d_key, d_val], -1)
        rows, log_f = torch.zeros(len(x), dtype=torch.int32), k if decay else None
        step(q[:, 0], k[:, 0], v[:, 0], state, rows, None if log_f is None else log_f[:, 0])
        chunked(q, k, v, state, rows, rows, log_f)
        absorb(k, v, state, rows, rows, log_f)


def layer(d_emb: int, heads: int, dtype: WeightDtype) -> None:
    """Products of a layer, with few rows as for decoding and many as for prefill."""
    project, scale = narrow(torch.zeros(heads * 96, d_emb), dtype)
    gate, gate_scale = narrow(torch.zeros(2 * d_emb, heads * 32), dtype)
    out, out_scale = narrow(torch.zeros(d_emb, d_emb), dtype)
    vectors = torch.zeros(2, d_emb)
    for rows in (1, 64, 1000):
        x = torch.zeros(rows, d_emb)
        linear(x, project, torch.zeros(heads * 96), scale, norm=(vectors[0], vectors[1], 1e-5))
        y = torch.zeros(rows, heads * 32)
        gated = linear(y, gate, torch.zeros(2 * d_emb), gate_scale, glu=True)
        linear(gated, out, None, out_scale, residual=x)


def position(d_emb: int) -> None:
    table, h = torch.zeros(100, d_emb), torch.zeros(4, d_emb, dtype=torch.float64)
    rows = torch.zeros(3, dtype=torch.int32)
    gates, ids = torch.zeros(3, 70, 2 * d_emb), torch.zeros(3, 70, dtype=torch.int32)
    recurrence.step(gates[:, 0].contiguous(), table, ids[:, 0].contiguous(), h, rows)
    recurrence.scan(gates, table, ids, h, rows, rows)


def sampling(vocab: int) -> None:
    rows = torch.zeros(3, dtype=torch.int32)
    choose(torch.zeros(3, vocab), rows, SamplerTable(4, torch.device("cpu")), rows.clone())
    resolve_inputs(torch.zeros(3, 5, dtype=torch.int32), rows)
    write_rows(torch.zeros(3, 768), torch.zeros(4, 768), rows)


LAUNCHES: dict[str, Callable[[], None]] = {
    "attention of the published model": lambda: attention(
        24, 32, 32, log_values=True, compensated=True
    ),
    "attention of the default model, whose keys decay": lambda: attention(
        12, 32, 32, log_values=False, compensated=True, decay=True
    ),
    "attention of odd heads, linear": lambda: attention(
        3, 24, 40, log_values=False, compensated=True
    ),
    "attention that is not compensated": lambda: attention(
        2, 8, 8, log_values=True, compensated=False
    ),
    "products in float32": lambda: layer(768, 24, "float32"),
    "products in bfloat16": lambda: layer(768, 24, "bfloat16"),
    "products in int8": lambda: layer(768, 24, "int8"),
    "positions": lambda: position(768),
    "choice of tokens": lambda: sampling(50304),
}
