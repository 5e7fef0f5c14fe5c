"""Baseline: causal softmax attention.

Everything else is as in `LanguageModel`: embedding, latent positions, residual layers with or
without token shift and output gate, and so the number of parameters. For training and measurement
only: its state, the keys and values of a context, has no fixed size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel

BASE = 10_000.0
"""Base of the rotary position embedding (arXiv 2104.09864) of queries and keys."""


@dataclass(frozen=True)
class SoftmaxState:
    """Keys and values of a batch of sequences, per layer."""

    h: Tensor
    """`[batch, d_emb]`"""
    k: Tensor
    """Before rotation, the latest last. `[batch, layers, context, heads, d_k]`"""
    v: Tensor
    """`[batch, layers, context, heads, d_v]`"""
    seen: Tensor
    """How many are valid, at most `context`, at the end. `[batch]`"""
    previous: Tensor
    """With token shift; see `AttentionState`. `[batch, layers, d_emb]`"""

    def detach(self) -> "SoftmaxState":
        """The same values, detached from the autograd graph."""
        return self._map(lambda x: x.detach())

    def replace(self, chosen: Tensor, other: "SoftmaxState") -> "SoftmaxState":
        """`other` where `chosen` `[batch]` is true, self elsewhere."""
        return self._map(
            lambda own, others: torch.where(chosen.view(-1, *[1] * (own.dim() - 1)), others, own),
            other,
        )

    def _map(self, function: Callable[..., Tensor], *others: "SoftmaxState") -> "SoftmaxState":
        names = self.__dataclass_fields__
        return SoftmaxState(
            **{name: function(*(getattr(x, name) for x in (self, *others))) for name in names}
        )


class SoftmaxModel(LanguageModel):
    """y_t = sum_i softmax_i(q_t k_i / sqrt(d_k)) v_i over the current chunk and a context before
    it.

    As in Transformer-XL (arXiv 1901.02860), the context holds tokens of earlier chunks, without
    gradient.
    """

    def __init__(self, config: ModelConfig, context: int = 1024) -> None:
        """Raises ValueError for an unsupported config."""
        if config.log_values or config.decay:
            raise ValueError("softmax attention needs linear values and no decay")
        super().__init__(config)
        self.context = context

    def empty_state(self, batch: int) -> SoftmaxState:  # type: ignore[override]
        """The state before the first token."""
        c, like = self.config, self.embed.weight.detach()
        sizes = (batch, c.n_layers, self.context, c.n_heads)
        return SoftmaxState(
            h=like.new_zeros((batch, c.d_emb), dtype=torch.float64),
            k=like.new_zeros((*sizes, c.d_key)),
            v=like.new_zeros((*sizes, c.d_val)),
            seen=torch.zeros(batch, dtype=torch.int64, device=like.device),
            previous=like.new_zeros((batch, c.n_layers, c.d_emb)),
        )

    def unroll(  # type: ignore[override]
        self, token_ids: Tensor, state: SoftmaxState
    ) -> tuple[Tensor, SoftmaxState]:
        """token_ids `[batch, tokens]` -> logits `[batch, tokens, vocab_sz]` and the state after."""
        tokens = token_ids.shape[1]
        emb = self._embed(token_ids)
        all_h, h = self.embed_pos(emb, state.h, None)
        x = emb + all_h.to(emb.dtype)
        place = torch.arange(self.context + tokens, device=x.device)
        now = place[self.context :, None]
        first = self.context - state.seen[:, None, None]
        seen = (place <= now) & (place >= first)
        keys, values, previous = [], [], []
        for layer, past_k, past_v, before in zip(
            self.blocks, *(t.unbind(1) for t in (state.k, state.v, state.previous)), strict=True
        ):
            p = layer.project(x, before)
            k, v = torch.cat([past_k, p.k], 1), torch.cat([past_v, p.v], 1)
            q_, k_, v_ = (t.transpose(1, 2) for t in (rotate(p.q, now[:, 0]), rotate(k, place), v))
            y = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=seen.unsqueeze(1))
            x = layer.merge(x, y.transpose(1, 2), p.gate)
            keys.append(k[:, tokens:])
            values.append(v[:, tokens:])
            previous.append(p.inputs[:, -1])
        after = replace(
            state,
            h=h,
            k=torch.stack(keys, 1),
            v=torch.stack(values, 1),
            seen=(state.seen + tokens).clamp(max=self.context),
            previous=torch.stack(previous, 1),
        )
        return self._logits(x), after


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotate queries or keys by their positions `[tokens]`; x `[batch, tokens, heads, d_k]`."""
    half = x.shape[-1] // 2
    speeds = BASE ** (-torch.arange(half, device=x.device) / half)
    angles = (places.unsqueeze(-1) * speeds).unsqueeze(-2)
    a, b, rest = x.tensor_split((half, 2 * half), -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
