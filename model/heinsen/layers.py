"""Layers of the network: latent positions, residual layers, and their state.

Parameter names are those of the reference implementation, so its state dicts load unchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.heinsen.attention import (
    CHUNK,
    EMPTY,
    Attention,
    AttentionState,
    on_grid,
    step,
)
from model.heinsen.config import DECAY_RANK, FASTEST_DECAY, SLOWEST_DECAY, ModelConfig
from model.state import StateSpec


@dataclass(frozen=True)
class NetworkState:
    """The latent state of a batch of sequences."""

    h: Tensor
    """`[batch, d_emb]`"""
    layers: tuple[AttentionState, ...]

    def detach(self) -> "NetworkState":
        """The same values, detached from the autograd graph."""
        return _combine(lambda x: x.detach(), self)

    def replace(self, chosen: Tensor, other: "NetworkState") -> "NetworkState":
        """`other` where `chosen` `[batch]` is true, self elsewhere."""

        def select(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (own.dim() - 1)), others, own)

        return _combine(select, self, other)


def _combine(function: Callable[..., Tensor], *states: NetworkState) -> NetworkState:
    """Apply a function to each tensor of a state, or to the same tensors of several."""
    layers = zip(*(state.layers for state in states), strict=True)
    return NetworkState(
        function(*(state.h for state in states)),
        tuple(first.map(function, *others) for first, *others in layers),
    )


class LatentPosition(nn.Module):
    """Position embedding h_t = logaddexp(logsigmoid(a_t) + h_{t-1}, b_t), [a, b] = Linear(emb)."""

    def __init__(self, d_emb: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d_emb, 2 * d_emb)

    def forward(self, emb: Tensor, h: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """emb `[batch, tokens, d_emb]`, h `[batch, d_emb]` -> all h_t, and the last one.

        Two steps (A1, b1) and (A2, b2) compose to (A1 + A2, logaddexp(A2 + b1, b2)), an associative
        operation: within a chunk the scan doubles its span, and unlike a difference of cumulative
        sums it never subtracts large numbers. Chunks pass h on in its own precision: if gates
        forget nothing, h is the log of a sum over all tokens.
        """
        exact = torch.promote_types(emb.dtype, torch.float32)
        decay, b = (x.to(exact) for x in self._gates(emb))
        if padding is not None:
            decay = decay.masked_fill(padding.unsqueeze(-1), 0.0)
            b = b.masked_fill(padding.unsqueeze(-1), EMPTY)
        tokens = emb.shape[1]
        missing = -tokens % CHUNK
        decay, b = (
            F.pad(x, (0, 0, 0, missing), value=fill).view(len(x), -1, CHUNK, x.shape[2])
            for x, fill in ((decay, 0.0), (b, EMPTY))
        )
        span = 1
        while span < CHUNK:
            joined = _logaddexp(decay[:, :, span:] + b[:, :, :-span], b[:, :, span:])
            b = torch.cat([b[:, :, :span], joined], 2)
            decay = torch.cat([decay[:, :, :span], decay[:, :, span:] + decay[:, :, :-span]], 2)
            span *= 2
        before = []
        for whole_decay, whole_b in zip(
            decay[:, :, -1].unbind(1), b[:, :, -1].unbind(1), strict=True
        ):
            before.append(h)
            h = _logaddexp(whole_decay + h, whole_b.to(h.dtype))
        all_h = _logaddexp(decay + torch.stack(before, 1).unsqueeze(2).to(exact), b)
        return all_h.flatten(1, 2)[:, :tokens], h

    def step(self, emb: Tensor, h: Tensor) -> Tensor:
        """One token: emb, h `[batch, d_emb]` -> the next h."""
        decay, b = self._gates(emb)
        return _logaddexp(decay + h, b.to(h.dtype))

    def _gates(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.dense(emb).chunk(2, -1)
        return F.logsigmoid(a), b


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) for finite numbers; the bits do not depend on the position in the
    tensor.

    On a CPU `torch.logaddexp` uses other instructions for the elements that do not fill a vector.
    """
    return torch.maximum(a, b) + (a - b).abs().neg().exp().log1p()


@dataclass(frozen=True)
class Projected:
    """Projections of a layer's input, before attention."""

    q: Tensor
    """`[batch, tokens, heads, d_k]`, like k"""
    k: Tensor
    v: Tensor
    """v, or log v. `[batch, tokens, heads, d_v]`"""
    log_f: Tensor | None
    """With `decay`: log f of each key channel; the shape of k"""
    gate: Tensor | None
    """`[batch, tokens, heads * d_v]`, with `output_gate`"""
    inputs: Tensor
    """With `token_shift`: inputs, starting with the previous token's. `[batch, tokens (+ 1),
    d_emb]`"""

    def mask(self, padding: Tensor | None, *, log_values: bool) -> "Projected":
        """Make the tokens with `padding` `[batch, tokens]` leave the state unchanged."""
        if padding is None:
            return self
        mask = padding[..., None, None]
        k, v = mask_padding(self.k, self.v, padding, log_values=log_values)
        log_f = None if self.log_f is None else self.log_f.masked_fill(mask, 0.0)
        return replace(self, q=self.q.masked_fill(mask, 0.0), k=k, v=v, log_f=log_f)

    def last_input(self, padding: Tensor | None) -> Tensor:
        """With `token_shift`: the input of each sequence's last token. `[batch, d_emb]`"""
        if padding is None:
            return self.inputs[:, -1]
        lengths = padding.logical_not().sum(1)
        return self.inputs[torch.arange(len(lengths), device=lengths.device), lengths]


def log_decay(rates: Tensor) -> Tensor:
    """log f of each key channel, from the layer's linear map."""
    return on_grid(-FASTEST_DECAY * rates.sigmoid())


class Layer(nn.Module):
    """x + FF2(attention(FF1(x))): the residual layer of the reference implementation.

    The extensions, with u = LayerNorm(x):

        token_shift   p_t + mix * (p_{t-1} - p_t) of p = Linear(u), and u = 0 before the first token
        decay         log f = -FASTEST_DECAY * sigmoid(Linear(Linear(u)))
        output_gate   y * silu(Linear(u)) for y
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_emb, heads = config.d_emb, config.n_heads
        self.split = (config.d_key, config.d_key, config.d_val)
        self.heads = heads
        self.feedforward1 = nn.Sequential(
            nn.LayerNorm(d_emb), nn.Linear(d_emb, heads * sum(self.split))
        )
        self.feedforward2 = nn.Sequential(
            nn.Linear(heads * config.d_val, 2 * d_emb),
            nn.GLU(dim=-1),
            nn.Linear(d_emb, d_emb, bias=False),
        )
        self.mix = nn.Parameter(torch.rand(heads * sum(self.split))) if config.token_shift else None
        self.decay = self.gate = None
        if config.decay:
            rates = nn.Linear(DECAY_RANK, heads * config.d_key)
            # Not linspace: on the meta device it imports hundreds of modules.
            per_key = math.log(SLOWEST_DECAY / FASTEST_DECAY) / max(1, config.d_key - 1)
            spread = torch.tensor([per_key * key for key in range(config.d_key)])
            with torch.no_grad():
                rates.bias.copy_(spread.repeat(heads))
            self.decay = nn.Sequential(nn.Linear(d_emb, DECAY_RANK, bias=False), rates)
        if config.output_gate:
            self.gate = nn.Linear(d_emb, heads * config.d_val, bias=False)

    def project(self, x: Tensor, previous: Tensor | None = None) -> Projected:
        """x `[batch, tokens, d_emb]`; `previous` `[batch, d_emb]` with `token_shift`."""
        norm, linear = self.feedforward1
        u = norm(x)
        if self.mix is None or previous is None:
            inputs, projected = u, linear(u)
        else:
            inputs = torch.cat([previous.to(u.dtype).unsqueeze(1), u], 1)
            projected = linear(inputs)
            before, now = projected[:, :-1], projected[:, 1:]
            projected = now + self.mix * (before - now)
        q, k, v = projected.unflatten(-1, (self.heads, -1)).split(self.split, -1)
        log_f = gate = None
        if self.decay is not None:
            log_f = log_decay(self.decay(u).to(x.dtype)).view(k.shape)
        if self.gate is not None:
            gate = F.silu(self.gate(u))
        return Projected(q, k, v, log_f, gate, inputs)

    def merge(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """Add the attention output y `[..., heads, d_v]` to x `[..., d_emb]`."""
        y = y.flatten(-2)
        added: Tensor = self.feedforward2(y if gate is None else y * gate)
        return x + added

    def forward(
        self, x: Tensor, state: AttentionState, attention: Attention, padding: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """x `[batch, tokens, d_emb]` -> the same shape, and the state after the last token."""
        made = self.project(x, state.previous)
        previous = state.previous
        if previous is not None:
            previous = made.last_input(padding).to(previous.dtype)
        with torch.autocast(x.device.type, enabled=False):
            p = made.mask(padding, log_values=state.n is not None)
            q, k, v = (t.to(state.m.dtype) for t in (p.q, p.k, p.v))
            y, state = attention(q, k, v, state, p.log_f)
        if padding is not None:
            y = y.masked_fill(padding[..., None, None], 0.0)
        return self.merge(x, y.to(x.dtype), made.gate), replace(state, previous=previous)

    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """One token, updating `state` in place: x `[batch, d_emb]` -> the same shape."""
        p = self.project(x.unsqueeze(1), state.previous)
        log_f = None if p.log_f is None else p.log_f[:, 0]
        y = step(p.q[:, 0], p.k[:, 0], p.v[:, 0], state, log_f)
        if state.previous is not None:
            state.previous.copy_(p.last_input(None))
        return self.merge(x, y, None if p.gate is None else p.gate[:, 0])


class Parts(Protocol):
    """A network's weights, for the compiled implementations."""

    config: ModelConfig
    embed: nn.Embedding
    embed_pos: LatentPosition
    lnorm: nn.LayerNorm
    num_parameters: int

    @property
    def blocks(self) -> list[Layer]: ...

    @property
    def state_spec(self) -> StateSpec: ...

    def num_threads(self, tokens: int, answers: int) -> int: ...


def mask_padding(
    k: Tensor, v: Tensor, padding: Tensor, *, log_values: bool
) -> tuple[Tensor, Tensor]:
    """Make the tokens with `padding` `[batch, tokens]` leave the state unchanged."""
    mask = padding[..., None, None]
    return k.masked_fill(mask, -torch.inf), v.masked_fill(mask, -torch.inf if log_values else 0.0)
