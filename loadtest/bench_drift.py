"""Drift of attention's output from float64 over 10 million tokens.

    python -m loadtest drift

One head with 8 key and 8 value channels, keys and log-values unit-normal; worst relative error of
the output over 64 queries. The paths: compiled (CPU), torch's `chunked` (plain prefill), torch's
`step` (plain decode; slow, so it only reads the last tokens, from the exact state before them), and
for comparison the log-space form in float32, up to 1 million tokens.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from model.heinsen.attention import AttentionState, chunked, step
from model.heinsen.cpu.kernels import attend, workspace
from model.heinsen.cpu.step import TOGETHER
from model.kernels.cpu.functions import jit

D = 8
BLOCK = 100_000
TOP = 8.0
"""Reference of the exact sums, above any key or log-value."""

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


def blocks(tokens: int) -> Iterator[tuple[Floats, Floats]]:
    """Keys and log-values `[BLOCK, D]`."""
    for start in range(0, tokens, BLOCK):
        numbers = np.random.default_rng(start).standard_normal((2, BLOCK, D), np.float32)
        yield numbers[0], numbers[1]


class Exact:
    """The sums in float64."""

    def __init__(self) -> None:
        self.z, self.s = np.zeros(D), np.zeros((D, D))

    def read(self, k: Floats, log_v: Floats) -> None:
        weights = np.exp(k.astype(np.float64) - TOP)
        self.z += weights.sum(0)
        self.s += weights.T @ np.exp(log_v.astype(np.float64) - TOP)

    def output(self, q: Doubles) -> Doubles:
        """q `[queries, D]` -> y."""
        e = np.exp(q)
        found: Doubles = np.exp(TOP) * (e @ self.s) / (e @ self.z)[:, None]
        return found

    def state(self) -> AttentionState:
        """The same sums as a served state."""
        m = torch.full((1, 1, D), TOP)
        z, s = (torch.from_numpy(x).float()[None, None] for x in (self.z, self.s))
        return AttentionState(m, z, s, m.clone(), *(torch.zeros_like(x).char() for x in (z, s)))


def output(state: AttentionState, q: Doubles) -> Doubles:
    """Output of a state, computed in float64, so that only the state's own error shows."""
    h_s, h_z = (h[0, 0].double().numpy() for h in state.map(Tensor.double).to_paper())
    e = np.exp(q)
    found: Doubles = (e @ np.exp(h_s)) / (e @ np.exp(h_z))[:, None]
    return found


def read_compiled(k: Floats, v: Floats, state: AttentionState) -> None:
    """Update `state` in place."""
    fields = (state.m, state.z, state.s, state.z_low, state.s_low, state.n)
    arrays = [x[0, 0].numpy() for x in fields if x is not None]
    p, y, none = np.concatenate([k, k, v], 1), np.empty_like(v), np.empty((0, 0), np.float32)
    space = workspace(TOGETHER, k.shape[1], v.shape[1])
    attend(0, 0, len(k), p, none, *arrays, True, False, y, space)


def read_chunks(k: Floats, v: Floats, state: AttentionState) -> AttentionState:
    keys, values = (torch.from_numpy(x)[None, :, None] for x in (k, v))
    with torch.inference_mode():
        return chunked(keys, keys, values, state)[1]


def read_steps(k: Floats, v: Floats, state: AttentionState) -> None:
    """Update `state` in place."""
    keys, values = (torch.from_numpy(x)[:, None, None] for x in (k, v))
    with torch.inference_mode():
        for key, value in zip(keys, values, strict=True):
            step(key, key, value, state)


@jit
def log_space(k: Any, v: Any, h_z: Any, h_s: Any) -> None:
    """The paper's recurrence in float32, in place."""
    for t in range(len(k)):
        for j in range(D):
            a, b = max(h_z[j], k[t, j]), min(h_z[j], k[t, j])
            h_z[j] = a + np.log1p(np.exp(b - a))
            for i in range(D):
                c = k[t, j] + v[t, i]
                a, b = max(h_s[j, i], c), min(h_s[j, i], c)
                h_s[j, i] = a + np.log1p(np.exp(b - a))


def main(
    tokens: Annotated[int, typer.Option(help="Total tokens.")] = 10_000_000,
    steps: Annotated[int, typer.Option(help="Tokens of these for torch's step.")] = 300_000,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    q = np.random.default_rng(1).standard_normal((64, D))
    exact, compiled, chunks = Exact(), Exact().state(), Exact().state()
    stepped: AttentionState | None = None
    h_z, h_s = np.full(D, -1e30, np.float32), np.full((D, D), -1e30, np.float32)
    shown = {10**i for i in range(5, 12)} | {tokens}

    def error(found: Doubles) -> str:
        expected = exact.output(q)
        return f"{np.abs(found / expected - 1).max():.1e}"

    print(f"{'tokens':>12} {'compiled':>10} {'chunks':>10} {'log space':>10}")
    for number, (k, v) in enumerate(blocks(tokens)):
        done = (number + 1) * BLOCK
        if tokens - done < steps and stepped is None:
            stepped = exact.state()
        exact.read(k, v)
        read_compiled(k, v, compiled)
        chunks = read_chunks(k, v, chunks)
        if stepped is not None:
            read_steps(k, v, stepped)
        if done <= 1_000_000:
            log_space(k, v, h_z, h_s)
        if done in shown:
            e = np.exp(q)
            paper = (e @ np.exp(h_s.astype(np.float64))) / (e @ np.exp(h_z.astype(np.float64)))[
                :, None
            ]
            in_logs = error(paper) if done <= 1_000_000 else "-"
            ours = [error(output(state, q)) for state in (compiled, chunks)]
            print(f"{done:12,} {ours[0]:>10} {ours[1]:>10} {in_logs:>10}")
    if stepped is not None:
        print(f"torch's step, the last {steps:,} tokens: {error(output(stepped, q))}")
