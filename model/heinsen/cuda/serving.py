"""Inference on a GPU with Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Batch
from model.heinsen.attention import AttentionState
from model.heinsen.cuda import attention, position
from model.heinsen.layers import Layer, Parts, log_decay
from model.kernels.cuda import linear
from model.kernels.cuda.graphs import move, to_device
from model.kernels.cuda.rows import write_rows
from model.kernels.linear import NarrowLinear
from model.state import StatePool


class Product(NamedTuple):
    """A linear map in the form `linear` needs."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    @staticmethod
    def of(module: nn.Module) -> "Product":
        if not isinstance(module, NarrowLinear):
            raise TypeError(f"not packed: {module}")
        return Product(module.weight, module.bias, module.scale)


class Block(NamedTuple):
    """One residual layer."""

    norm: linear.NormWeights
    project: Product
    glu: Product
    merge: Product
    mix: Tensor | None
    decay: tuple[Product, ...]
    """To a low rank, and from there to log f; empty without."""

    gate: Product | None

    @staticmethod
    def of(layer: Layer) -> "Block":
        return Block(
            _norm(layer.feedforward1[0]),
            Product.of(layer.feedforward1[1]),
            Product.of(layer.feedforward2[0]),
            Product.of(layer.feedforward2[2]),
            layer.mix,
            tuple(map(Product.of, layer.decay or ())),
            None if layer.gate is None else Product.of(layer.gate),
        )


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of similar length, padded to the longest."""

    first: int
    """Their first row in x."""

    sizes: tuple[int, int]
    """Number of prompts and of tokens each."""

    ids: Tensor
    rows: Tensor
    lengths: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Their slice of x `[all, ...]`: `[prompts, tokens, ...]`."""
        count, tokens = self.sizes
        return x[self.first : self.first + count * tokens].view(count, tokens, *x.shape[1:])

    def last_of(self, x: Tensor) -> Tensor:
        """Each prompt's last token in x: `[prompts, ...]`."""
        prompts = torch.arange(self.sizes[0], device=x.device)
        return self.of(x)[prompts, self.lengths.long() - 1]


@dataclass(frozen=True)
class Layout:
    """Order of a batch's tokens on the device: single tokens first, then the groups."""

    ids: Tensor
    """Rows of the single tokens."""

    rows: Tensor
    groups: Sequence[PromptGroup]
    places: NDArray[np.int64]
    """Position in x of each token of the batch."""

    @staticmethod
    def of(batch: Batch, device: torch.device) -> "Layout":
        ids, rows = batch.token_ids, np.array(batch.rows)
        single, *_ = np.nonzero(batch.lengths == 1)
        places = np.empty(len(ids), np.int64)
        places[batch.starts[single]] = np.arange(len(single))
        groups, first = list[PromptGroup](), len(single)
        for group in batch.groups():
            if batch.lengths[group[0]] == 1:
                continue
            padded = batch.padded(group)
            here = np.arange(padded.size).reshape(padded.shape)
            places[padded[padded >= 0]] = first + here[padded >= 0]
            read = np.where(padded >= 0, ids[padded], 0)
            groups.append(
                PromptGroup(
                    first,
                    (len(group), padded.shape[1]),
                    move(torch.from_numpy(read), device),
                    to_device(rows[group].tolist(), torch.int32, device),
                    to_device(batch.lengths[group].tolist(), torch.int32, device),
                )
            )
            first += padded.size
        return Layout(
            to_device(ids[batch.starts[single]].tolist(), torch.int32, device),
            to_device(rows[single].tolist(), torch.int32, device),
            groups,
            places,
        )


class FusedNetwork:
    """Four launches per layer, some more with extensions. Rows of a pool are read and written in
    place."""

    def __init__(self, network: Parts, unembed: NarrowLinear) -> None:
        """All linear maps of the network must be `NarrowLinear`."""
        c = network.config
        self.config, self.vocab_size = c, c.vocab_sz
        self._spec = network.state_spec
        self._embed = network.embed.weight
        self._position = Product.of(network.embed_pos.dense)
        self._blocks = [Block.of(layer) for layer in network.blocks]
        self._norm = _norm(network.lnorm)
        self._unembed = Product.of(unembed)
        self._seen: tuple[StatePool, tuple[AttentionState, ...]] | None = None
        """The last pool and its layers' states."""

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """Advance rows by one token each, without synchronising: for a CUDA graph.

        token_ids, rows `[batch]` int32 on the device -> logits `[batch, vocab_sz]`, written to
        `logits` if given. Negative rows are skipped, and their logits are undefined.
        """
        states = self._states(pool)
        gates = linear.linear(self._embed, *self._position, ids=token_ids)
        x = position.step(gates, self._embed, token_ids, pool.tensors["h"][0], rows)
        for block, state in zip(self._blocks, states, strict=True):
            x = self._layer(block, state, x, rows)
        write_rows(x, pool.tensors["last"][0], rows)
        return linear.linear(x, *self._unembed, norm=self._norm, out=logits)

    def forward(
        self, batch: Batch, pool: StatePool, single: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`LanguageModel.forward`. `single`: ids and rows of the single-token pieces on the device,
        int32 `[pieces]` each; negative rows are skipped.

        Matrix products run over all tokens at once. Single tokens go through attention as in
        `decode`, longer pieces in chunks.
        """
        states = self._states(pool)
        batch.check(self.config.vocab_sz, pool.num_rows)
        layout = Layout.of(batch, pool.device)
        ids, rows = single or (layout.ids, layout.rows)
        all_ids = torch.cat([ids.long(), *(group.ids.flatten() for group in layout.groups)])
        gates = linear.linear(self._embed, *self._position, ids=all_ids)
        h, x = pool.tensors["h"][0], gates.new_empty(len(all_ids), self.config.d_emb)
        count = len(ids)
        x[:count] = position.step(gates[:count], self._embed, ids, h, rows)
        for group in layout.groups:
            own = group.of(gates), self._embed, group.ids, h, group.rows, group.lengths
            group.of(x)[:] = position.scan(*own)
        for block, state in zip(self._blocks, states, strict=True):
            x = self._layer(block, state, x, rows, layout.groups)
        write_rows(x[:count], pool.tensors["last"][0], rows)
        for group in layout.groups:
            write_rows(group.last_of(x), pool.tensors["last"][0], group.rows)
        wanted = to_device(layout.places[batch.logits_at].tolist(), torch.int64, pool.device)
        return linear.linear(x[wanted], *self._unembed, norm=self._norm)

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.logits`: one per row `[batch, vocab_sz]`."""
        x = pool.tensors["last"][0].index_select(0, self._index(pool, rows))
        return linear.linear(x, *self._unembed, norm=self._norm)

    def _layer(
        self,
        block: Block,
        state: AttentionState,
        x: Tensor,
        rows: Tensor,
        groups: Sequence[PromptGroup] = (),
    ) -> Tensor:
        """`Layer.forward` of x `[tokens, d_emb]`: a token of each of `rows`, then the groups'."""
        c, count = self.config, len(rows)
        if c.extensions:
            u = F.layer_norm(x, x.shape[1:], *block.norm)
            projected = _project(block, u, state, rows, groups)
        else:
            u, projected = x, linear.linear(x, *block.project, norm=block.norm)
        q, k, v = projected.view(len(x), c.n_heads, -1).tensor_split((c.d_key, 2 * c.d_key), -1)
        rates = u
        for product in block.decay:
            rates = linear.linear(rates, *product)
        log_f = log_decay(rates).view(k.shape) if block.decay else None
        parts = []
        if count:
            fall = None if log_f is None else log_f[:count]
            parts.append(attention.step(q[:count], k[:count], v[:count], state, rows, fall))
        for group in groups:
            each = group.of(q), group.of(k), group.of(v)
            fall = None if log_f is None else group.of(log_f)
            y, _ = attention.chunked(*each, state, group.rows, group.lengths, fall)
            parts.append(y.flatten(0, 1))
        y = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
        if block.gate is not None:
            y *= F.silu(linear.linear(u, *block.gate))
        return linear.linear(linear.linear(y, *block.glu, glu=True), *block.merge, residual=x)

    def _states(self, pool: StatePool) -> tuple[AttentionState, ...]:
        """Views of the pool, layer by layer."""
        if pool.spec != self._spec:
            raise ValueError("the pool was not made by this network's new_pool")
        if self._seen is None or self._seen[0] is not pool:
            self._seen = pool, AttentionState.of_layers(pool)
        return self._seen[1]

    def _index(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Raises IndexError for missing or duplicate rows."""
        if min(rows) < 0 or max(rows) >= pool.num_rows or len(set(rows)) != len(rows):
            raise IndexError(f"rows {list(rows)} of {pool.num_rows}")
        return to_device(rows, torch.int32, pool.device)


def _project(
    block: Block,
    u: Tensor,
    state: AttentionState,
    rows: Tensor,
    groups: Sequence[PromptGroup],
) -> Tensor:
    """Projections of the normed inputs u, with token shift mixed with those of the tokens before
    them, and the state's `previous` inputs replaced."""
    if block.mix is None or state.previous is None:
        return linear.linear(u, *block.project)
    count = len(rows)
    first = torch.cat([rows, *(group.rows for group in groups)]).clamp(min=0)
    both = linear.linear(torch.cat([u, state.previous.index_select(0, first)]), *block.project)
    now, carried = both[: len(u)], both[len(u) :]
    before = torch.empty_like(now)
    before[:count] = carried[:count]
    write_rows(u[:count], state.previous, rows)
    for group in groups:
        end = count + group.sizes[0]
        own = group.of(before)
        own[:, 0], own[:, 1:] = carried[count:end], group.of(now)[:, :-1]
        write_rows(group.last_of(u), state.previous, group.rows)
        count = end
    mixed: Tensor = now + block.mix * (before - now)
    return mixed


def _norm(module: nn.Module) -> linear.NormWeights:
    if not isinstance(module, nn.LayerNorm):
        raise TypeError(f"not a norm: {module}")
    return module.weight, module.bias, module.eps
