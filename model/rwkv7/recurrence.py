"""The state of RWKV-7's time mixing: one token at a time, and chunks of tokens by matrix products.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

for each head, with S `[value channels, key channels]`, the decay w in (exp(-exp(-1/2)), 1), the
normalised key to remove a = -kk and b = kk * rate (arXiv 2503.14456). States are stored transposed,
`[..., key channels, value channels]`. Both functions take and return the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 64
"""Chunk size. A chunk's decays multiply to at least exp(-64 * 0.607) = 1e-17, whose inverse float32
represents at full precision."""

Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""r, log w, k, v, a, b, all `[batch, tokens, heads, channels]`. A token with log w, k and a of 0
leaves the state unchanged."""


Recurrence = Callable[[Vectors, Tensor], tuple[Tensor, Tensor]]
"""`recurrent` or an equivalent."""


def recurrent(vectors: Vectors, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. s `[batch, heads, key, value]` -> y `[batch, tokens, heads, value]`, s."""
    steps = []
    for r, log_w, k, v, a, b in zip(*(x.unbind(1) for x in vectors), strict=True):
        removed = (s * a.unsqueeze(-1)).sum(-2, keepdim=True)
        s = s * log_w.exp().unsqueeze(-1) + b.unsqueeze(-1) * removed
        s = s + k.unsqueeze(-1) * v.unsqueeze(-2)
        steps.append((s * r.unsqueeze(-1)).sum(-2))
    return torch.stack(steps, 1), s


def chunked(vectors: Vectors, s: Tensor) -> tuple[Tensor, Tensor]:
    """`recurrent` in chunks of `CHUNK` tokens.

    With W_t the product of a chunk's decays up to t, and u_t = S_{t-1} a_t the value removed at t,

        S_t = S_0 diag(W_t) + sum_{i <= t} (u_i b_i^T + v_i k_i^T) diag(W_t / W_i),

    so the u of a chunk solve a triangular system, and the rest are masked products.
    """
    parts = []
    for chunk in zip(*(torch.split(x, CHUNK, 1) for x in vectors), strict=True):
        y, s = _chunk(tuple(x.transpose(1, 2) for x in chunk), s)
        parts.append(y.transpose(1, 2))
    return torch.cat(parts, 1), s


def _chunk(vectors: tuple[Tensor, ...], s: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk; vectors `[batch, heads, tokens, channels]`."""
    r, log_w, k, v, a, b = vectors
    total = log_w.cumsum(-2)
    # r, a = r * total.exp(), a * (total - log_w).exp()  # a precedes the token's own decay
    r, a = r * total.exp(), a * (total - log_w).exp()
    grown = total.neg().exp()
    k, b = (k * grown).transpose(-1, -2), (b * grown).transpose(-1, -2)
    ones = torch.ones(r.shape[-2:-1] * 2, dtype=torch.bool, device=r.device)
    before, until = ones.tril(-1), ones.tril()
    known = a @ s + (a @ k).where(before, 0) @ v
    system = torch.eye(len(ones), dtype=r.dtype, device=r.device) - (a @ b).where(before, 0)
    u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    y = r @ s + (r @ b).where(until, 0) @ u + (r @ k).where(until, 0) @ v
    decayed = total[..., -1, :, None].exp()
    return y, decayed * (s + b @ u + k @ v)
