"""Layers of RWKV-7 in plain torch, for pieces of several sequences at once.

The letters are those of the official weights (`att.x_r`, `att.k_k`, `ffn.x_k`, ...):

    x_*         shares of the previous token: for receptance, decay w, key, value, rate a, gate g
    w, a, v, g  low-rank maps: to decays, in-context rates, shares of layer 0's value, gates
    k_k, k_a    scales of the key that is removed, and of the rate's effect on the key that is added
    r_k         weights of the current token's bonus
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.linear import NarrowLinear, PackedLinear
from model.rwkv7.recurrence import Recurrence, Vectors

Linear = NarrowLinear | PackedLinear

LOG_SLOWEST = -math.exp(-0.5)
"""Log of the fastest decay: log w = LOG_SLOWEST * sigmoid(...)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


@dataclass(frozen=True)
class LowRank:
    """up(f(down(x))); an optional bias is in `up`."""

    down: Linear
    up: Linear


@dataclass(frozen=True)
class TimeMix:
    """Attention, named `att` in the weights."""

    shares: Tensor
    """x_r, x_w, x_k, x_v, x_a, x_g. `[6, d_emb]`"""

    receptance: Linear
    key: Linear
    value: Linear
    output: Linear
    decay: LowRank
    rate: LowRank
    first: LowRank | None
    """In all layers but the first."""

    gate: LowRank
    k_k: Tensor
    """`[d_emb]`, like k_a"""

    k_a: Tensor
    r_k: Tensor
    """`[heads, head_size]`"""

    norm: Norm
    """Normalised per head."""

    def __call__(
        self,
        x: Tensor,
        before: Tensor,
        s: Tensor,
        v_first: Tensor | None,
        padding: Tensor | None,
        recurrence: Recurrence,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, before `[batch, tokens, d_emb]`, s `[batch, heads, key, value]`, padding `[batch,
        tokens]` -> the addition to the residual stream, s, and layer 0's value."""
        xr, xw, xk, xv, xa, xg = (x + (before - x) * share for share in self.shares)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        log_w = LOG_SLOWEST * self.decay.up(self.decay.down(xw).tanh()).sigmoid()
        rate = self.rate.up(self.rate.down(xa)).sigmoid()
        gate = self.gate.up(self.gate.down(xg).sigmoid())
        if self.first is None or v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * self.first.up(self.first.down(xv)).sigmoid()
        kk = self._heads(k * self.k_k)
        kk = F.normalize(kk, dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, k, v_heads, rate, log_w = (self._heads(t) for t in (r, k, v, rate, log_w))
        vectors: Vectors = (r, log_w, k, v_heads, -kk, kk * rate)
        if padding is not None:
            mask = padding[..., None, None]
            vectors = (r, *(t.masked_fill(mask, 0) for t in vectors[1:]))  # type: ignore[assignment]
        y, s = recurrence(vectors, s)
        y = F.group_norm(y.flatten(0, 1), y.shape[2], eps=self.norm.eps).view(y.shape)
        y = y.flatten(2) * self.norm.weight + self.norm.bias
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v_heads
        added: Tensor = self.output((y + bonus.flatten(2)) * gate)
        return added, s, v_first

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], *self.r_k.shape)


@dataclass(frozen=True)
class ChannelMix:
    """The feed-forward network, named `ffn` in the weights."""

    share: Tensor
    """`[d_emb]`"""

    key: Linear
    value: Linear

    def __call__(self, x: Tensor, before: Tensor) -> Tensor:
        added: Tensor = self.value(self.key(x + (before - x) * self.share).relu().square())
        return added


@dataclass(frozen=True)
class Layer:
    """x + time mixing of norm(x), then x + channel mixing of norm(x)."""

    time_norm: Norm
    time_mix: TimeMix
    channel_norm: Norm
    channel_mix: ChannelMix


@dataclass(frozen=True)
class Weights:
    """All weights of a network."""

    embed: Tensor
    """`[vocab, d_emb]`"""

    embed_norm: Norm
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear


States = Mapping[str, Tensor]
"""Tensors of a pool's spec, each `[layers, batch, ...]`."""


def read(
    weights: Weights, ids: Tensor, lengths: Tensor, states: States, recurrence: Recurrence
) -> tuple[Tensor, dict[str, Tensor]]:
    """ids `[batch, tokens]`; each sequence has the first lengths `[batch]` of them, at least one.

    Returns the last layer's outputs `[batch, tokens, d_emb]` and the states after. Computes in the
    dtype of the states.
    """
    tokens = torch.arange(ids.shape[1], device=ids.device)
    padding = tokens >= lengths.unsqueeze(1)
    mask = padding if bool(padding.any()) else None
    rows, ends = torch.arange(len(ids), device=ids.device), lengths - 1
    x = weights.embed_norm(weights.embed[ids].to(states["last"].dtype))
    after: dict[str, list[Tensor]] = {name: [] for name in states}
    v_first = None
    for number, layer in enumerate(weights.layers):
        u = layer.time_norm(x)
        before = _shifted(u, states["att_shift"][number])
        added, s, v_first = layer.time_mix(
            u, before, states["wkv"][number], v_first, mask, recurrence
        )
        x = x + added
        after["att_shift"].append(u[rows, ends])
        after["wkv"].append(s)
        u = layer.channel_norm(x)
        x = x + layer.channel_mix(u, _shifted(u, states["ffn_shift"][number]))
        after["ffn_shift"].append(u[rows, ends])
    after["last"].append(x[rows, ends])
    return x, {name: torch.stack(parts) for name, parts in after.items()}


def _shifted(x: Tensor, first: Tensor) -> Tensor:
    """The previous token's x for each token: x `[batch, tokens, d_emb]`, first `[batch, d_emb]`."""
    return torch.cat([first.unsqueeze(1), x[:, :-1]], 1)
