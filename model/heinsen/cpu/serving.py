"""A network's `forward`, compiled for the CPU."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Batch
from model.compiled import Compiled
from model.heinsen.config import DECAY_RANK
from model.heinsen.cpu import step
from model.heinsen.layers import Layer, Parts
from model.kernels.linear import PackedLinear
from model.state import StatePool


class CompiledNetwork(Compiled):
    """`Compiled` for this family."""

    def __init__(self, network: Parts, unembed: PackedLinear) -> None:
        """The network's linear maps must be `PackedLinear`; its tensors must not be moved
        afterwards."""
        self._kept: list[object] = [network.embed.weight, unembed]
        super().__init__(
            step.forward_function(unembed.arithmetic, network.embed.weight.dtype),
            self._fixed_arguments(network, unembed),
            network.state_spec,
            network.config.vocab_sz,
            network.num_threads,
        )

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """`LanguageModel.forward`. Raises ValueError for another network's pool."""
        index = np.array(batch.rows, np.int64)
        a = self._arguments(pool, index)
        batch.check(self._vocab_sz, pool.num_rows)
        ends, read = batch.ends, batch.logits_at
        if len(ends) == len(read) == len(batch.token_ids) and (ends == read).all():
            kept = read  # single tokens are already in order
        else:
            kept = np.unique(np.concatenate([ends, read]))
            ends, read = np.searchsorted(kept, ends), np.searchsorted(kept, read)
        ids, starts = (np.ascontiguousarray(x) for x in (batch.token_ids, batch.starts))
        a["tokens"], a["ids"], a["starts"] = len(ids), ids.ctypes.data, starts.ctypes.data
        a["num_retained"], a["kept"] = len(kept), kept.ctypes.data
        a["ends"], a["read"] = ends.ctypes.data, read.ctypes.data
        a["num_read"] = len(read)
        return self._run(a, len(ids), len(index), len(read))

    def _workspace_sizes(self, tokens: int, rows: int) -> dict[str, int]:
        d, heads, d_key, d_val = (int(self._fixed[n]) for n in ("d_emb", "heads", "d_key", "d_val"))
        keys, values = heads * d_key, heads * d_val
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
        return {name: (tokens + rows) * width for name, width in widths.items()}

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
        """Addresses of the weight, the scale and the bias; 0 if absent."""
        if module is None:
            return 0, 0, 0
        if not isinstance(module, PackedLinear):
            raise TypeError(f"not packed: {module}")
        self._kept.append(module)
        return module.addresses
