"""Softmax attention with constant cost per token, in three equivalent forms.

Heinsen, "Softmax Attention with Constant Cost per Token", 2024, arXiv 2404.05843. The similarity
of a query and a key is the log of the dot product of their exponentials, so the output is a ratio
of two sums over the past (eqs. 2 and 5),

    y_t = sum_{i<=t} (sum_j exp(q_tj + k_ij)) v_i  /  sum_{i<=t} (sum_j exp(q_tj + k_ij)),

and the whole past fits in a state of fixed size. In the functions, per head:

    q, k   query and key of a token                                             [d_k]
    v      value of a token; with log values, the network gives log v           [d_v]
    H_Z    log sum_i exp(k_i)                     the paper's state, eq. 6      [d_k]
    H_S    log sum_i exp(k_i) v_i                 the paper's state, eq. 6      [d_k, d_v]
    m      running maximum of k per key channel, rounded up to a whole number   [d_k]
    n      the same of log v per value channel, only with log values            [d_v]
    Z      sum_i exp(k_i - m)                     H_Z = m + log Z               [d_k]
    S      sum_i exp(k_i - m) exp(log v_i - n)    H_S = m + n + log S           [d_k, d_v]
    e      exp(q + m), scaled so that its largest channel is 1; the largest m
           is subtracted first, so that large keys cost q no digits            [d_k]
    y      sum_j e_j S_j / sum_j e_j Z_j, times exp(n) with log values          [d_v]
    f      decay factor of a key channel; 1 in the paper                       [d_k]
    D      sum of log f from the start of a chunk to a token, D <= 0            [d_k]

The state here is (m, Z, S, n): sums relative to a running maximum. In exact arithmetic it equals
the paper's (H_Z, H_S); in float32 it is far more accurate than logs of sums.

Two things keep it accurate over millions of tokens. Maxima are integers: sums are rescaled only
when they shrink by at least e, so that a factor near 1 is not applied, and rounded, a million
times. And Z and S carry compensation terms `z_low` and `s_low`, one byte per number: the sum's
rounding error in 1/256 ulp, added back with the next token. A sum of 10 million terms is as
accurate as one of a few.

Beyond the paper, a key channel may decay: before each token its past is multiplied by f,

    H_Z[t] = logaddexp(H_Z[t-1] + log f_t, k_t)
    H_S[t] = logaddexp(H_S[t-1] + log f_t, k_t + log v_t).

Only m changes, by log f; Z and S do not. Relative to the start of a chunk, token t sees key i as
k_i - D_i + D_t: attention without decay, with keys k - D and queries q + D. Their running maximum
is an integer above the m before the chunk, so sums are still rescaled rarely; and log f is a
multiple of 2^-16, so that m is exact in float32 while |m| <= 256.

Queries, keys and values are `[batch, tokens, heads, d]`, states `[batch, heads, ...]`. With log
values the argument `v` is log v and the result is log y. A padding token has k = -inf and v = -inf
(0 with linear values), and log f = 0; it does not change the state, and its output is undefined.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from model.state import StatePool

EMPTY = -1e30
"""Running maximum before the first token: below any key, but finite, so that no difference is
NaN."""

CHUNK = 64
"""Chunk size of `chunked`: tokens whose mutual attention is one matrix product."""

GRID = 2.0**-16
"""log f is a multiple of this. A channel that would forget less than half of it never forgets."""

SMALLEST = 1e-28
"""A sum below this, relative to its largest term's reference, may have lost terms."""


FLAT = 1e-32
"""For smaller sums the derivative of log may overflow float32: it is taken as 0."""


@dataclass(frozen=True)
class AttentionState:
    """Sums over the past of a batch of sequences, relative to running maxima."""

    m: Tensor
    """`[batch, heads, d_k]`"""
    z: Tensor
    """`[batch, heads, d_k]`"""
    s: Tensor
    """`[batch, heads, d_k, d_v]`"""
    n: Tensor | None
    """`[batch, heads, d_v]` with log values, None with linear values"""
    z_low: Tensor | None = None
    """int8, the shape of z; None where sequences are short enough, as in training."""
    s_low: Tensor | None = None
    """int8, the shape of s"""
    previous: Tensor | None = None
    """With `token_shift`: the layer's normed input of the previous token. `[batch, d_emb]`"""

    @staticmethod
    def empty(
        batch: int, heads: int, d_key: int, d_val: int, *, log_values: bool, like: Tensor
    ) -> "AttentionState":
        """The state before the first token, with the dtype and device of `like`."""
        return AttentionState(
            m=like.new_full((batch, heads, d_key), EMPTY),
            z=like.new_zeros((batch, heads, d_key)),
            s=like.new_zeros((batch, heads, d_key, d_val)),
            n=like.new_full((batch, heads, d_val), EMPTY) if log_values else None,
        )

    @staticmethod
    def of_layers(pool: StatePool) -> "tuple[AttentionState, ...]":
        """The states of all rows per layer, as views of the pool."""
        if "s" not in pool.tensors:
            raise ValueError("the pool was not made by LanguageModel.new_pool")
        names = [field.name for field in fields(AttentionState) if field.name in pool.tensors]
        layers: list[dict[str, Any]] = [
            {name: pool.tensors[name][i] for name in names} for i in range(len(pool.tensors["s"]))
        ]
        return tuple(AttentionState(**({"n": None} | layer)) for layer in layers)

    def select(self, index: slice | Tensor) -> "AttentionState":
        """Some of the sequences: views for a slice, copies for a tensor of indices."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[..., Tensor], *others: "AttentionState") -> "AttentionState":
        """Apply a function to each tensor that all of these states have."""
        made: dict[str, Any] = {}
        for field in fields(self):
            tensors = [getattr(state, field.name) for state in (self, *others)]
            made[field.name] = None if any(x is None for x in tensors) else function(*tensors)
        return AttentionState(**made)

    def to_paper(self) -> tuple[Tensor, Tensor]:
        """(H_S, H_Z) of eq. 6; -inf for empty sums.

        With linear values H_S is log |S|: the real-valued form cannot represent the sign.
        """
        scale = self.m.unsqueeze(-1)
        if self.n is not None:
            scale = scale + self.n.unsqueeze(-2)
        return self.s.abs().log() + scale, self.z.log() + self.m

    @staticmethod
    def from_paper(h_s: Tensor, h_z: Tensor) -> "AttentionState":
        """The inverse of `to_paper` with log values: h_s `[..., d_k, d_v]`, h_z `[..., d_k]`."""
        m = h_z.clamp(min=EMPTY).ceil()
        relative = h_s - m.unsqueeze(-1)
        n = relative.amax(-2).clamp(min=EMPTY).ceil()
        return AttentionState(m, (h_z - m).exp(), (relative - n.unsqueeze(-2)).exp(), n)


class Attention(Protocol):
    """Signature of `quadratic` and `chunked`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """y and the state after the last token; log_f `[batch, tokens, heads, d_k]`, None for 0."""


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    """The definition, eq. 1: every query against every key, all in logarithms. Used as reference.

    Compute and memory are quadratic in the number of tokens. A carried state enters as d_k earlier
    tokens, one per key channel: key H_Z[j] in channel j alone, value S_j / Z_j.
    """
    end = absorb(k, v, state, log_f)
    if log_f is not None:
        fallen = log_f.cumsum(1)
        q, k = q + fallen, k - fallen
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens, log_values = q.shape[2], state.n is not None
    h_s, h_z = state.to_paper()
    seen = torch.isfinite(h_z).all(-1)[..., None, None]
    scores = torch.logsumexp(q.unsqueeze(3) + k.unsqueeze(2), -1)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    scores = torch.cat([q + h_z.unsqueeze(2), scores], -1)
    log_weights = scores - torch.logsumexp(scores, -1, keepdim=True)
    if log_values:
        past = torch.where(seen, h_s - h_z.unsqueeze(-1), 0.0)
        values = torch.cat([past, v], 2)
        y = torch.logsumexp(log_weights.unsqueeze(-1) + values.unsqueeze(2), 3)
    else:
        past = torch.where(seen, state.s / state.z.unsqueeze(-1), 0.0)
        y = log_weights.exp() @ torch.cat([past, v], 2)
    return y.transpose(1, 2), end


def on_grid(log_f: Tensor) -> Tensor:
    """Round to multiples of `GRID`; the gradient passes through."""
    return (log_f.detach() / GRID).round() * GRID + (log_f - log_f.detach())


def absorb(
    k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> AttentionState:
    """The state after all tokens of k and v, as by `chunked`, without outputs."""
    k, v = _pad_to_chunks(k, -torch.inf), _pad_to_chunks(v, _neutral_value(state))
    log_f = None if log_f is None else _pad_to_chunks(log_f, 0.0)
    return _sum(k, v, state, CHUNK, log_f).end


def step(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> Tensor:
    """One token per sequence, updating `state` in place; the paper's recurrent mode.

    q, k, log_f `[batch, heads, d_k]`, v `[batch, heads, d_v]` -> `[batch, heads, d_v]`. Cost and
    memory do not depend on the number of tokens seen.
    """
    before = state.m if log_f is None else state.m + log_f
    m = _raised(before, k)
    kept, weight = (before - m).exp_(), (k - m).exp_()
    state.m.copy_(m)
    if state.n is None:
        u, kept_s = v, kept.unsqueeze(-1)
    else:
        n = torch.maximum(state.n, v.ceil())
        u, kept_s = (v - n).exp_(), kept.unsqueeze(-1) * (state.n - n).exp_().unsqueeze(-2)
        state.n.copy_(n)
    added = weight.unsqueeze(-1) * u.unsqueeze(-2)
    for total, low, keep, add in (
        (state.z, state.z_low, kept, weight),
        (state.s, state.s_low, kept_s, added),
    ):
        after, lost = _add(total * keep, add, low)
        total.copy_(after)
        if low is not None and lost is not None:
            low.copy_(lost)
    e = q + (m - m.amax(-1, keepdim=True))
    e = (e - e.amax(-1, keepdim=True)).exp_()
    numerator = (e.unsqueeze(-2) @ state.s).squeeze(-2)
    denominator = (e * state.z).sum(-1, keepdim=True)
    return _ratio(numerator, denominator, state.n)


def _add(before: Tensor, added: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compensated sum of `before`, `low` and `added`: the rounded sum and its new compensation.

    The rounding error of a sum of two numbers is representable (Dekker 1971).
    """
    if low is None:
        return before + added, None
    added = added + low * _unit(before)
    after = before + added
    lost = (added - (after - before)) / _unit(after)
    return after, lost.clamp_(-127, 127).round_().to(torch.int8)


def _unit(x: Tensor) -> Tensor:
    """1/256 ulp of each number, for numbers above 2^-95."""
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=0x10000000)
    return exponent.view(torch.float32) * 2.0**-31


def _ratio(numerator: Tensor, denominator: Tensor, n: Tensor | None) -> Tensor:
    """y, or log y with log values; finite even if a sum underflowed to zero."""
    tiny = torch.finfo(numerator.dtype).tiny
    denominator = denominator.clamp(min=tiny)
    if n is None:
        return numerator / denominator
    if numerator.requires_grad:
        numerator = torch.where(numerator > FLAT, numerator, numerator.detach())
    return numerator.clamp(min=tiny).log() - denominator.log() + n


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    """Many tokens at once as matrix products, from a carried state; differentiable.

    Tokens are cut into chunks of 64. Within a chunk all exponentials are relative to one reference
    per channel, the running maximum at the chunk's end, rounded up. If keys or log-values rise
    within a chunk by more than float32 can hold, sums fall below `SMALLEST`; such a sequence is
    recomputed in halves, down to single tokens. Memory is linear in the number of tokens.

    On one CPU thread the bits do not depend on how the tokens are split into calls at multiples of
    64, nor on the other sequences of the batch.
    """
    tokens = q.shape[1]
    q, k, v = (
        _pad_to_chunks(x, pad) for x, pad in ((q, 0.0), (k, -torch.inf), (v, _neutral_value(state)))
    )
    log_f = None if log_f is None else _pad_to_chunks(log_f, 0.0)
    y, end = _in_halves(q, k, v, state, CHUNK, log_f)
    return y[:, :tokens], end


def _in_halves(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, size: int, log_f: Tensor | None
) -> tuple[Tensor, AttentionState]:
    """`chunked` for a multiple of `size` tokens, in chunks of at most this size."""
    sums = _sum(k, v, state, size, log_f)
    y, exact = _read(q, sums)
    if size == 1 or bool(exact.all()):
        return y, sums.end
    # Keep the failed attempt out of the graph: its gradients can be infinite.
    again_for = torch.ones_like(exact) if y.requires_grad else ~exact
    rows = again_for.nonzero().squeeze(1)
    q, k, v, again = q[rows], k[rows], v[rows], state.select(rows)
    early = late = None
    num_chunks = q.shape[1] // size
    if num_chunks == 1:
        size //= 2
    half = size * max(1, num_chunks // 2)
    if log_f is not None:
        early, late = log_f[rows, :half], log_f[rows, half:]
    first, again = _in_halves(q[:, :half], k[:, :half], v[:, :half], again, size, early)
    second, _ = _in_halves(q[:, half:], k[:, half:], v[:, half:], again, size, late)
    whole = torch.cat([first, second], 1)
    return whole if y.requires_grad else y.index_copy_(0, rows, whole), sums.end


@dataclass(frozen=True)
class _Sums:
    """Sums over the past at the start of each chunk, and the contributions of its own tokens."""

    m: Tensor
    """Reference of each chunk's exponentials. `[batch, heads, chunks, d_k]`"""
    n: Tensor | None
    """`[batch, heads, chunks, d_v]` with log values"""
    fallen: Tensor | None
    """D of each token, if keys decay. `[batch, heads, chunks, size, d_k]`"""
    a: Tensor
    """exp(k - D - m). `[batch, heads, chunks, size, d_k]`"""
    u: Tensor
    """exp(log v - n), or v. `[batch, heads, chunks, size, d_v]`"""
    z: Tensor
    """Relative to the chunk's reference, like s. `[batch, heads, chunks, d_k]`"""
    s: Tensor
    """`[batch, heads, chunks, d_k, d_v]`"""
    end: AttentionState
    """After the last chunk."""


def _sum(k: Tensor, v: Tensor, state: AttentionState, size: int, log_f: Tensor | None) -> _Sums:
    """Add up the tokens chunk by chunk; k, v, log_f `[batch, chunks * size, heads, d]`."""
    k, v = _into_chunks(k, size), _into_chunks(v, size)
    if log_f is None:
        fallen = None
        m, kept_m = _references(k.detach(), state.m)
        end_m = m[:, :, -1]
    else:
        fallen = _into_chunks(log_f, size).cumsum(3)
        m, kept_m, end_m = _falling_references((k - fallen).detach(), state.m, fallen[..., -1, :])
    a = k - m.unsqueeze(3)
    a = (a if fallen is None else a - fallen).exp()
    if state.n is None:
        n, u, kept = None, v, kept_m.unsqueeze(-1)
    else:
        n, kept_n = _references(v.detach(), state.n)
        u = (v - n.unsqueeze(3)).exp()
        kept = kept_m.unsqueeze(-1) * kept_n.unsqueeze(-2)
    z, end_z, z_low = _carry(a.sum(3), kept_m, state.z, state.z_low)
    s, end_s, s_low = _carry(a.mT @ u, kept, state.s, state.s_low)
    end_n = None if n is None else n[:, :, -1]
    end = AttentionState(end_m, end_z, end_s, end_n, z_low, s_low)
    return _Sums(m, n, fallen, a, u, z, s, end)


def _read(q: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
    """The output of every token, and which sequences `[batch]` kept full precision in every sum."""
    m, n, a, u = sums.m, sums.n, sums.a, sums.u
    q = _into_chunks(q, a.shape[3])
    top = m.amax(-1, keepdim=True)
    relative = (m - top).unsqueeze(3)
    if sums.fallen is not None:
        relative = relative + sums.fallen
        relative = relative - relative.detach().amax(-1, keepdim=True)
    logits = q + relative
    e = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    weights = (e @ a.mT).tril()
    numerator = torch.baddbmm(
        (e @ sums.s).flatten(0, 2), weights.flatten(0, 2), u.flatten(0, 2)
    ).view(*weights.shape[:-1], -1)
    denominator = weights.sum(-1, keepdim=True) + e @ sums.z.unsqueeze(-1)
    smallest = denominator if n is None else torch.minimum(numerator.amin(-1, True), denominator)
    exact = (smallest.detach() > SMALLEST) | (top < EMPTY / 10).unsqueeze(3)
    # Compiled code takes a failed attempt times zeros as its gradient: infinity would become NaN.
    y = _ratio(numerator, denominator.clamp(min=SMALLEST), None if n is None else n.unsqueeze(3))
    y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return y, exact.flatten(1).all(1)


def _neutral_value(state: AttentionState) -> float:
    return 0.0 if state.n is None else -torch.inf


def _pad_to_chunks(x: Tensor, pad: float) -> Tensor:
    """Pad `[batch, tokens, heads, d]` at the end to whole chunks."""
    missing = -x.shape[1] % CHUNK
    if not missing:
        return x
    return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), pad)], 1)


def _into_chunks(x: Tensor, size: int) -> Tensor:
    """`[batch, chunks * size, heads, d]` -> `[batch, heads, chunks, size, d]`."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).permute(0, 3, 1, 2, 4).contiguous()


def _references(x: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Running maximum at the end of each chunk, and the factor for the sums before it.

    x `[batch, heads, chunks, size, d]`, carried `[batch, heads, d]`; both results are `[batch,
    heads, chunks, d]`.
    """
    at_end = torch.cat([carried.detach().unsqueeze(2), x.amax(3).ceil()], 2).cummax(2).values
    return at_end[:, :, 1:], (at_end[:, :, :-1] - at_end[:, :, 1:]).exp()


def _falling_references(
    x: Tensor, carried: Tensor, fallen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_references` where m falls by `fallen` over each chunk; also m after the last one.

    x `[batch, heads, chunks, size, d]` relative to the starts of the chunks, carried `[batch,
    heads, d]`, fallen `[batch, heads, chunks, d]`.
    """
    references, kept = [], []
    for largest, fall in zip(x.amax(3).unbind(2), fallen.unbind(2), strict=True):
        references.append(_raised(carried.detach(), largest))
        kept.append((carried - references[-1]).exp())
        carried = references[-1] + fall
    return torch.stack(references, 2), torch.stack(kept, 2), carried


def _raised(m: Tensor, k: Tensor) -> Tensor:
    """The smallest m + integer that is at least m and k."""
    below = m.floor()
    # Not + (m - below): if that is 0, -0 keeps its sign, as in the paper's form.
    return torch.maximum(m, (k - (m - below)).ceil() - (below - m))


def _carry(
    sums: Tensor, kept: Tensor, carried: Tensor, low: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums before each chunk, relative to the chunk's reference, and the sum after the last.

    sums, kept `[batch, heads, chunks, ...]`, carried and its `low` `[batch, heads, ...]`.
    """
    before = []
    for chunk in range(sums.shape[2]):
        before.append(carried * kept[:, :, chunk])
        carried, low = _add(before[-1], sums[:, :, chunk], low)
    return torch.stack(before, 2), carried, low
