"""A network's `forward`, compiled for the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Batch
from model.heinsen.config import DECAY_RANK
from model.heinsen.cpu import step
from model.heinsen.layers import Layer, Parts
from model.kernels.cpu.workers import run_on_threads
from model.kernels.linear import PackedLinear
from model.state import StatePool


class CompiledNetwork:
    """Holds what the compiled code reads: the addresses of the network's weights.

    May be called from several threads at once, for different rows.
    """

    def __init__(self, network: Parts, unembed: PackedLinear) -> None:
        """The network's linear maps are `PackedLinear`; its tensors must not move any more."""
        self._kept: list[object] = [network.embed.weight, unembed]
        self._vocab_sz = network.config.vocab_sz
        self._num_threads = network.num_threads
        self._spec = network.state_spec
        self._function = step.forward_function(unembed.arithmetic, network.embed.weight.dtype)
        self._fixed = self._fixed_arguments(network, unembed)

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """`LanguageModel.forward`. Raises ValueError for a foreign pool."""
        self._check(pool)
        batch.check(self._vocab_sz, pool.num_rows)
        index = np.array(batch.rows, np.int64)
        ends, read = batch.ends, batch.logits_at
        if len(ends) == len(read) == len(batch.token_ids) and (ends == read).all():
            kept = read  # of single tokens it is in order already
        else:
            kept = np.unique(np.concatenate([ends, read]))
            ends, read = np.searchsorted(kept, ends), np.searchsorted(kept, read)
        ids, starts = (np.ascontiguousarray(x) for x in (batch.token_ids, batch.starts))
        logits = torch.empty(len(read), self._vocab_sz)
        a = self._arguments(pool, index)
        workspace = _allocate_workspace(len(ids), len(index), a)
        a["tokens"], a["ids"], a["starts"] = len(ids), ids.ctypes.data, starts.ctypes.data
        a["num_retained"], a["kept"] = len(kept), kept.ctypes.data
        a["ends"], a["read"] = ends.ctypes.data, read.ctypes.data
        a["num_read"], a["logits"] = len(read), logits.data_ptr()
        run_on_threads(self._function, a, self._num_threads(len(ids), len(read)))
        del workspace  # until here compiled code writes to it
        return logits

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.logits`: of each row `[batch, vocab_sz]`."""
        self._check(pool)
        index = pool.index(rows)
        logits = torch.empty(len(rows), self._vocab_sz)
        a = self._arguments(pool, index)
        workspace = _allocate_workspace(0, len(rows), a)
        a["logits"] = logits.data_ptr()
        run_on_threads(self._function, a, self._num_threads(0, len(rows)))
        del workspace  # until here compiled code writes to it
        return logits

    def _check(self, pool: StatePool) -> None:
        if pool.spec != self._spec or pool.device.type != "cpu":
            raise ValueError("the pool was not made by this network's new_pool")

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


def _allocate_workspace(tokens: int, sequences: int, a: NDArray[np.void]) -> NDArray[np.float32]:
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
    workspace = np.empty(rows * sum(widths.values()), np.float32)
    address = workspace.ctypes.data
    for name, width in widths.items():
        a[name] = address
        address += workspace.itemsize * rows * width
    return workspace
