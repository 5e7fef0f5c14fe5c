"""The network that serves on a GPU: all of its computing is in the kernels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.heinsen.attention import CHUNK, AttentionState
from model.heinsen.cuda import attention, position
from model.heinsen.layers import Layer, Parts
from model.kernels.cuda import linear
from model.kernels.cuda.graphs import move, to_device
from model.kernels.cuda.rows import write_rows
from model.kernels.linear import NarrowLinear
from model.network import TakeLogits
from model.state import StatePool


class Product(NamedTuple):
    """A linear map, as `linear` takes it."""

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

    norm: linear.Norm
    project: Product
    gate: Product
    merge: Product

    @staticmethod
    def of(layer: Layer) -> "Block":
        return Block(
            _norm(layer.feedforward1[0]),
            Product.of(layer.feedforward1[1]),
            Product.of(layer.feedforward2[0]),
            Product.of(layer.feedforward2[2]),
        )


class FusedNetwork:
    """Four launches a layer. Rows of a pool are read and written in place."""

    def __init__(self, network: Parts, unembed: NarrowLinear) -> None:
        """The network's linear maps are `NarrowLinear`."""
        c = network.config
        self.config, self.vocab_size = c, c.vocab_sz
        self._spec = network.state_spec
        self._embed = network.embed.weight
        self._position = Product.of(network.embed_pos.dense)
        self._blocks = [Block.of(layer) for layer in network.blocks]
        self._norm = _norm(network.lnorm)
        self._unembed = Product.of(unembed)
        self._seen: tuple[StatePool, tuple[AttentionState, ...]] | None = None
        """The last pool, with the states of its layers."""

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """Advance rows by one token each, without a look at any number: for a CUDA graph.

        token_ids, rows `[batch]` int32 on the device -> logits `[batch, vocab_sz]`, in the tensor
        that is given if one is. Where the row is negative nothing is read or written, and the
        logits mean nothing.
        """
        states = self._states(pool)
        gates = linear.linear(self._embed, *self._position, ids=token_ids)
        x = position.step(gates, self._embed, token_ids, pool.tensors["h"][0], rows)
        for block, state in zip(self._blocks, states, strict=True):
            q, k, v = self._project(block, x, x.shape[:1])
            y = attention.step(q, k, v, state, rows)
            x = self._merge(block, x, y.flatten(1))
        write_rows(x, pool.tensors["last"][0], rows)
        return linear.linear(x, *self._unembed, norm=self._norm, out=logits)

    def step(self, token_ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.step`: token_ids `[batch]` -> logits `[batch, vocab_sz]`."""
        return self.decode(move(token_ids.int(), pool.device), self._index(pool, rows), pool)

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.logits`: of each row `[batch, vocab_sz]`."""
        x = pool.tensors["last"][0].index_select(0, self._index(pool, rows))
        return linear.linear(x, *self._unembed, norm=self._norm)

    def prefill(
        self, token_ids: Tensor, lengths: Sequence[int], pool: StatePool, rows: Sequence[int],
        scored: Mapping[int, TakeLogits],
    ) -> None:  # fmt: skip
        """`LanguageModel.prefill`: token_ids `[batch, tokens]`, of which `lengths[i]` count."""
        index, counts = self._index(pool, rows), to_device(lengths, torch.int32, pool.device)
        token_ids = move(token_ids.contiguous(), pool.device)
        batch, tokens = token_ids.shape
        gates = linear.linear(self._embed, *self._position, ids=token_ids.flatten())
        h = pool.tensors["h"][0]
        x = position.scan(gates.view(batch, tokens, -1), self._embed, token_ids, h, index, counts)
        x = x.flatten(0, 1)
        *inner, last = zip(self._blocks, self._states(pool), strict=True)
        for block, state in inner:
            x = self._read(block, state, x, (batch, tokens), index, counts)
        block, state = last
        if not scored:
            _, k, v = self._project(block, x, (batch, tokens))
            attention.absorb(k, v, state, index, counts)
            return
        x = self._read(block, state, x, (batch, tokens), index, counts)
        for place, take in scored.items():
            own = x[place * tokens :][: lengths[place]]
            for part in torch.split(own, CHUNK):
                take(linear.linear(part, *self._unembed, norm=self._norm))

    def _read(
        self, block: Block, state: AttentionState, x: Tensor, sizes: tuple[int, int],
        rows: Tensor, lengths: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = self._project(block, x, sizes)
        y, _ = attention.chunked(q, k, v, state, rows, lengths)
        return self._merge(block, x, y.flatten(0, 1).flatten(1))

    def _project(
        self, block: Block, x: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[tokens, d_emb]` -> q, k `[*sizes, heads, d_k]` and v: views of one tensor."""
        c = self.config
        projected = linear.linear(x, *block.project, norm=block.norm).view(*sizes, c.n_heads, -1)
        q, k, v = projected.tensor_split((c.d_key, 2 * c.d_key), -1)
        return q, k, v

    def _merge(self, block: Block, x: Tensor, y: Tensor) -> Tensor:
        gated = linear.linear(y, *block.gate, glu=True)
        return linear.linear(gated, *block.merge, residual=x)

    def _states(self, pool: StatePool) -> tuple[AttentionState, ...]:
        """Views of the pool, layer by layer."""
        if pool.spec != self._spec:
            raise ValueError("the pool was not made by this network's new_pool")
        if self._seen is None or self._seen[0] is not pool:
            self._seen = pool, AttentionState.of_layers(pool)
        return self._seen[1]

    def _index(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Raises IndexError for rows that the pool does not have, or that come twice."""
        if min(rows) < 0 or max(rows) >= pool.num_rows or len(set(rows)) != len(rows):
            raise IndexError(f"rows {list(rows)} of {pool.num_rows}")
        return to_device(rows, torch.int32, pool.device)


def _norm(module: nn.Module) -> linear.Norm:
    if not isinstance(module, nn.LayerNorm):
        raise TypeError(f"not a norm: {module}")
    return module.weight, module.bias, module.eps
