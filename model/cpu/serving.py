"""A network's `forward`, compiled for the CPU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Batch
from model.config import DECAY_RANK
from model.cpu import step
from model.cpu.team import run_team
from model.linear import PackedLinear
from model.state import StatePool

if TYPE_CHECKING:
    from model.network import LanguageModel, Layer


class CompiledNetwork:
    """Holds what the compiled code reads: the addresses of the network's weights.

    May be called from several threads at once, for different rows.
    """

    def __init__(self, network: "LanguageModel", unembed: PackedLinear) -> None:
        """The network's linear maps are `PackedLinear`; its tensors must not move any more."""
        self._kept: list[object] = [network.embed.weight, unembed]
        self._vocab_sz = network.config.vocab_sz
        self._num_threads = network.num_threads
        self._spec = network.state_spec
        self._function = step.forward_function(unembed.weight.dtype, network.embed.weight.dtype)
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
        room = _room_for(len(ids), len(index), a)
        a[step.TOKENS], a[step.IDS], a[step.STARTS] = len(ids), ids.ctypes.data, starts.ctypes.data
        a[step.NUM_KEPT], a[step.KEPT] = len(kept), kept.ctypes.data
        a[step.ENDS], a[step.READ] = ends.ctypes.data, read.ctypes.data
        a[step.NUM_READ], a[step.LOGITS] = len(read), logits.data_ptr()
        run_team(self._function, a, self._num_threads(len(ids), len(read)))
        del room  # until here compiled code writes to it
        return logits

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`LanguageModel.logits`: of each row `[batch, vocab_sz]`."""
        self._check(pool)
        index = np.array(rows, np.int64)
        if index.min() < 0 or index.max() >= pool.num_rows:
            raise IndexError(f"rows {list(rows)} of {pool.num_rows}")
        logits = torch.empty(len(rows), self._vocab_sz)
        a = self._arguments(pool, index)
        room = _room_for(0, len(rows), a)
        a[step.LOGITS] = logits.data_ptr()
        run_team(self._function, a, self._num_threads(0, len(rows)))
        del room  # until here compiled code writes to it
        return logits

    def _check(self, pool: StatePool) -> None:
        if pool.spec != self._spec or pool.device.type != "cpu":
            raise ValueError("the pool was not made by this network's new_pool")

    def _arguments(self, pool: StatePool, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """A call's arguments as far as network, pool and rows decide them; the others are 0."""
        a = self._fixed.copy()
        a[step.SEQUENCES], a[step.INDEX] = len(index), index.ctypes.data
        a[step.POOL_ROWS] = pool.num_rows
        names = ("h", "last", "m", "z", "s", "z_low", "s_low", "n", "previous")
        for place, name in zip(range(step.H, step.PREVIOUS + 1), names, strict=True):
            tensor = pool.tensors.get(name)
            a[place] = 0 if tensor is None else tensor.data_ptr()
        return a

    def _fixed_arguments(
        self, network: "LanguageModel", unembed: PackedLinear
    ) -> NDArray[np.int64]:
        c = network.config
        layers = [
            (
                *self._norm(layer.feedforward1[0]),
                *self._product(layer.feedforward1[1]),
                *self._product(layer.feedforward2[0]),
                *self._product(layer.feedforward2[2]),
                *self._extensions(layer),
            )
            for layer in network.blocks
        ]
        a = np.zeros(step.NUM_FORWARD, np.int64)
        a[step.D_EMB], a[step.HEADS], a[step.LAYERS] = c.d_emb, c.n_heads, c.n_layers
        a[step.D_KEY], a[step.D_VAL], a[step.VOCAB] = c.d_key, c.d_val, c.vocab_sz
        a[step.LOG_VALUES] = c.log_values
        a[step.EMBED] = network.embed.weight.data_ptr()
        a[step.POSITION] = self._table(self._product(network.embed_pos.dense))
        a[step.NORM] = self._table(self._norm(network.lnorm))
        a[step.UNEMBED] = self._table(unembed.addresses)
        a[step.LAYER_TABLE] = self._table(layers)
        return a

    def _extensions(self, layer: "Layer") -> tuple[int, ...]:
        """What `step.LAYER_FIELDS` says of them."""
        none = (0, 0, 0)
        self._kept.append(layer.mix)
        return (
            0 if layer.mix is None else layer.mix.data_ptr(),
            *(none + none if layer.decay is None else ()),
            *(address for part in layer.decay or () for address in self._product(part)),
            *(none if layer.gate is None else self._product(layer.gate)),
        )

    def _norm(self, module: nn.Module) -> tuple[int, int]:
        """Addresses of the weight and the bias."""
        if not isinstance(module, nn.LayerNorm):
            raise TypeError(f"not a norm: {module}")
        self._kept += [module.weight, module.bias]
        return module.weight.data_ptr(), module.bias.data_ptr()

    def _product(self, module: nn.Module) -> tuple[int, int, int]:
        """Addresses of the weight, the scale and the bias."""
        if not isinstance(module, PackedLinear):
            raise TypeError(f"not packed: {module}")
        self._kept.append(module)
        return module.addresses

    def _table(self, addresses: object) -> int:
        """The address of addresses."""
        table = np.array(addresses, np.int64)
        self._kept.append(table)
        return table.ctypes.data


def _room_for(tokens: int, sequences: int, a: NDArray[np.int64]) -> NDArray[np.float32]:
    """Room for what is computed on the way for so many tokens, with its parts entered in `a`."""
    d, heads, d_key = int(a[step.D_EMB]), int(a[step.HEADS]), int(a[step.D_KEY])
    widths = {
        step.X: d,
        step.NORMED: d,
        step.PROJECTED: heads * int(2 * d_key + a[step.D_VAL]),
        step.Y: heads * int(a[step.D_VAL]),
        step.GATES: 2 * d,
        step.GLU: d,
        step.RANK: DECAY_RANK,
        step.RATES: heads * d_key,
        step.OUTPUT_GATE: heads * int(a[step.D_VAL]),
    }
    rows = tokens + sequences
    room = np.empty(rows * sum(widths.values()), np.float32)
    address = room.ctypes.data
    for place, width in widths.items():
        a[place] = address
        address += room.itemsize * rows * width
    return room
