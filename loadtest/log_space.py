"""The paper's own log-space form of the network, for comparison."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.heinsen.network import LanguageModel


class LogSpaceForm:
    """The same network as the paper writes it: (H_S, H_Z) as logarithms of sums, eqs. 2, 5 and 6.

    Prefill materialises the scan of all states, as the reference implementation does.
    """

    def __init__(self, network: LanguageModel, batch: int) -> None:
        c = network.config
        shape = (c.n_layers, batch, c.n_heads, c.d_key)
        self.network = network
        device = network.device
        self.h = torch.zeros(batch, c.d_emb, device=device)
        self.h_s = torch.full((*shape, c.d_val), -torch.inf, device=device)
        self.h_z = torch.full(shape, -torch.inf, device=device)

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor) -> Tensor:
        """token_ids `[1, tokens]`, from an empty state -> logits of the last token."""
        network = self.network
        emb = network.embed(token_ids)
        a, b = network.embed_pos.dense(emb).chunk(2, -1)
        decay = F.logsigmoid(a).cumsum(1)
        x = emb + decay + torch.logaddexp(self.h.unsqueeze(1), (b - decay).logcumsumexp(1))
        for layer in network.blocks:
            p = layer.project(x)
            q, k, log_v = p.q, p.k, p.v
            h_s = (k.unsqueeze(-1) + log_v.unsqueeze(-2)).logcumsumexp(1)
            h_z = k.logcumsumexp(1)
            x = layer.merge(x, _read(q, h_s, h_z))
        return F.linear(network.lnorm(x[:, -1]), network.embed.weight)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """One token of every sequence: `[batch]` -> logits."""
        network = self.network
        emb = network.embed(token_ids)
        a, b = network.embed_pos.dense(emb).chunk(2, -1)
        self.h = torch.logaddexp(F.logsigmoid(a) + self.h, b)
        x = emb + self.h
        for number, layer in enumerate(network.blocks):
            p = layer.project(x.unsqueeze(1))
            q, k, log_v = p.q[:, 0], p.k[:, 0], p.v[:, 0]
            h_s, h_z = self.h_s[number], self.h_z[number]
            torch.logaddexp(h_s, k.unsqueeze(-1) + log_v.unsqueeze(-2), out=h_s)
            torch.logaddexp(h_z, k, out=h_z)
            x = layer.merge(x, _read(q, h_s, h_z))
        return F.linear(network.lnorm(x), network.embed.weight)


def _read(q: Tensor, h_s: Tensor, h_z: Tensor) -> Tensor:
    return (q.unsqueeze(-1) + h_s).logsumexp(-2) - (q + h_z).logsumexp(-1, keepdim=True)
