"""A network's `prefill` and `step`, compiled for the CPU."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.heinsen.config import DECAY_RANK
from model.heinsen.cpu import step
from model.heinsen.layers import Layer, Parts
from model.kernels.cpu.team import run_team
from model.kernels.linear import PackedLinear
from model.network import TakeLogits
from model.state import StatePool

MOST_TOKENS = 512
"""Tokens that go through the network at once: bounds the memory, fills the processor."""

MOST_SCORED = 128
"""The same where logits of prompts are asked for, which take far more memory. As many rows share
one reading of the weights, so that less at once is no slower."""


class CompiledNetwork:
    """Holds what the compiled code reads: the addresses of the network's weights.

    May be called from several threads at once, for different rows.
    """

    def __init__(self, network: Parts, unembed: PackedLinear) -> None:
        """The network's linear maps are `PackedLinear`; its tensors must not move any more."""
        self._kept: list[object] = [network.embed.weight, unembed]
        self._vocab_sz = network.config.vocab_sz
        self._spec = network.state_spec
        self._function = step.forward_function(unembed.weight.dtype, network.embed.weight.dtype)
        self._fixed = self._fixed_arguments(network, unembed)

    def forward(
        self, token_ids: NDArray[np.int64], lengths: Sequence[int], pool: StatePool,
        rows: Sequence[int], *, read: Sequence[int], keeps_last: bool = False,
    ) -> Tensor:  # fmt: skip
        """Advance the rows in place by so many tokens each, those of the first sequence first.

        token_ids `[sum of lengths]` -> logits of all tokens of the sequences whose places are in
        `read`, one sequence after another `[their tokens, vocab_sz]`. `keeps_last`, for lengths of
        1: keep what `logits` needs.
        Raises IndexError for a token or row that there is not, ValueError for a foreign pool.
        """
        index, counts = self._index(pool, rows), np.array(lengths, np.int64)
        if len(index) != len(counts):
            raise IndexError(f"{len(counts)} sequences for rows {list(rows)}")
        if min(lengths) < 1 or counts.sum() != len(token_ids):
            raise IndexError(f"{len(token_ids)} tokens for sequences of {list(lengths)}")
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_sz:
            raise IndexError(f"token ids must be from 0 to {self._vocab_sz - 1}")
        starts = np.concatenate([[0], counts.cumsum()])
        places = _places(starts, read)
        logits = torch.empty(len(places), self._vocab_sz)
        a = self._arguments(pool, index)
        room = _room_for(len(token_ids), len(rows), a)
        a["tokens"] = len(token_ids)
        a["ids"], a["starts"] = token_ids.ctypes.data, starts.ctypes.data
        a["num_read"], a["read"] = len(places), places.ctypes.data
        a["logits"] = logits.data_ptr()
        if not keeps_last:
            a["last"] = 0
        run_team(self._function, a)
        del room  # until here compiled code writes to it
        return logits

    def prefill(
        self, token_ids: Tensor, lengths: Sequence[int], pool: StatePool, rows: Sequence[int],
        scored: Mapping[int, TakeLogits],
    ) -> None:  # fmt: skip
        """`LanguageModel.prefill`: token_ids `[batch, tokens]`, of which `lengths[i]` count."""
        share = max(1, (MOST_SCORED if scored else MOST_TOKENS) // len(rows))
        ids = token_ids.numpy()
        for start in range(0, max(lengths), share):
            counts = [min(length - start, share) for length in lengths]
            now = [i for i, count in enumerate(counts) if count > 0]
            parts = [ids[i, start : start + counts[i]] for i in now]
            read = [place for place, i in enumerate(now) if i in scored]
            logits = self.forward(
                np.concatenate(parts, dtype=np.int64),
                [counts[i] for i in now],
                pool,
                [rows[i] for i in now],
                read=read,
            )
            asked = [now[place] for place in read]
            own = torch.split(logits, [counts[i] for i in asked])
            for i, each in zip(asked, own, strict=True):
                scored[i](each)

    def step(self, token_ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.step`: token_ids `[batch]` -> logits `[batch, vocab_sz]`."""
        ids = np.ascontiguousarray(token_ids.numpy(), np.int64)
        count = len(rows)
        return self.forward(ids, [1] * count, pool, rows, read=range(count), keeps_last=True)

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.logits`: of each row `[batch, vocab_sz]`."""
        index = self._index(pool, rows)
        logits = torch.empty(len(rows), self._vocab_sz)
        a = self._arguments(pool, index)
        room = _room_for(0, len(rows), a)
        a["logits"] = logits.data_ptr()
        run_team(self._function, a)
        del room  # until here compiled code writes to it
        return logits

    def _index(self, pool: StatePool, rows: Sequence[int]) -> NDArray[np.int64]:
        """Raises ValueError for a foreign pool, IndexError for a row that there is not."""
        if pool.spec != self._spec or pool.device.type != "cpu":
            raise ValueError("the pool was not made by this network's new_pool")
        index = np.array(rows, np.int64)
        if index.min() < 0 or index.max() >= pool.num_rows:
            raise IndexError(f"rows {list(rows)} of {pool.num_rows}")
        if len(set(rows)) != len(rows):
            raise IndexError(f"rows {list(rows)}: one comes twice")
        return index

    def _arguments(self, pool: StatePool, index: NDArray[np.int64]) -> NDArray[np.void]:
        """A call's arguments as far as network, pool and rows decide them; the others are 0."""
        a = self._fixed.copy()
        a["sequences"], a["index"] = len(index), index.ctypes.data
        a["pool_rows"] = pool.num_rows
        for name in step.STATE:
            tensor = pool.tensors.get(name)
            a[name] = 0 if tensor is None else tensor.data_ptr()
        return a

    def _fixed_arguments(self, network: Parts, unembed: PackedLinear) -> NDArray[np.void]:
        c = network.config
        a = np.zeros((), step.FORWARD)
        a["d_emb"], a["heads"], a["layers"] = c.d_emb, c.n_heads, c.n_layers
        a["d_key"], a["d_val"], a["vocab"] = c.d_key, c.d_val, c.vocab_sz
        a["log_values"] = c.log_values
        a["embed"] = network.embed.weight.data_ptr()
        a["position"] = self._product(network.embed_pos.dense)
        a["norm"] = self._norm(network.lnorm)
        a["unembed"] = unembed.addresses
        table = np.array([self._layer(layer) for layer in network.blocks], step.LAYER)
        self._kept.append(table)
        a["layer_table"] = table.ctypes.data
        return a

    def _layer(self, layer: Layer) -> tuple[object, ...]:
        """The fields of `step.LAYER`."""
        self._kept.append(layer.mix)
        rank, rates = layer.decay or (None, None)
        return (
            self._norm(layer.feedforward1[0]),
            self._product(layer.feedforward1[1]),
            self._product(layer.feedforward2[0]),
            self._product(layer.feedforward2[2]),
            0 if layer.mix is None else layer.mix.data_ptr(),
            self._product(rank),
            self._product(rates),
            self._product(layer.gate),
        )

    def _norm(self, module: nn.Module) -> tuple[int, int]:
        """Addresses of the weight and the bias."""
        if not isinstance(module, nn.LayerNorm):
            raise TypeError(f"not a norm: {module}")
        self._kept += [module.weight, module.bias]
        return module.weight.data_ptr(), module.bias.data_ptr()

    def _product(self, module: nn.Module | None) -> tuple[int, int, int]:
        """Addresses of the weight, the scale and the bias; 0 for what there is not."""
        if module is None:
            return 0, 0, 0
        if not isinstance(module, PackedLinear):
            raise TypeError(f"not packed: {module}")
        self._kept.append(module)
        return module.addresses


def _places(starts: NDArray[np.int64], sequences: Sequence[int]) -> NDArray[np.int64]:
    """Where the tokens of some sequences stand: those of i from starts[i] to starts[i + 1]."""
    if len(sequences) == len(starts) - 1:
        return np.arange(starts[-1])
    ranges = [np.arange(starts[i], starts[i + 1]) for i in sequences]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def _room_for(tokens: int, sequences: int, a: NDArray[np.void]) -> NDArray[np.float32]:
    """Room for what is computed on the way for so many tokens, with its parts entered in `a`."""
    d, keys, values = int(a["d_emb"]), int(a["heads"] * a["d_key"]), int(a["heads"] * a["d_val"])
    widths = {
        "x": d,
        "normed": d,
        "projected": 2 * keys + values,
        "y": values,
        "gates": 2 * d,
        "glu": d,
        "rank": DECAY_RANK,
        "rates": keys,
        "output_gate": values,
    }
    rows = tokens + sequences
    room = np.empty(rows * sum(widths.values()), np.float32)
    address = room.ctypes.data
    for name, width in widths.items():
        a[name] = address
        address += room.itemsize * rows * width
    return room
