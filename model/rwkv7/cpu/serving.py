"""A network's `forward`, compiled for the CPU."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch
from model.compiled import Compiled
from model.kernels.linear import PackedLinear
from model.rwkv7.config import Config
from model.rwkv7.cpu import step
from model.rwkv7.layers import Layer, Linear, LowRank, Norm, Weights
from model.state import StatePool

Addresses = tuple[int, ...]


class CompiledNetwork(Compiled):
    """`Compiled` for this family."""

    def __init__(
        self, config: Config, weights: Weights, num_threads: Callable[[int, int], int]
    ) -> None:
        """The linear maps must be `PackedLinear`; the tensors must not be moved afterwards."""
        self._kept: list[object] = [weights]
        self._config = config
        self.arithmetic = _packed(weights.head).arithmetic
        small = _packed(weights.layers[0].time_mix.gate.down).arithmetic
        super().__init__(
            step.forward_function(self.arithmetic, small, weights.embed.dtype, config.head_size),
            self._fixed_arguments(weights),
            config.state_spec,
            config.vocab_size,
            num_threads,
        )

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """`RWKV7.forward`. Raises ValueError for another network's pool."""
        index, read = np.array(batch.rows, np.int64), np.ascontiguousarray(batch.logits_at)
        a = self._arguments(pool, index)
        batch.check(self._vocab_sz, pool.num_rows)
        ids, starts = (np.ascontiguousarray(x) for x in (batch.token_ids, batch.starts))
        owner = np.repeat(np.arange(len(index)), batch.lengths)
        a["tokens"], a["ids"], a["starts"] = len(ids), ids.ctypes.data, starts.ctypes.data
        a["owner"] = owner.ctypes.data
        a["num_read"], a["read"] = len(read), read.ctypes.data
        return self._run(a, len(ids), max(len(ids), len(read)), len(read))

    def _workspace_sizes(self, tokens: int, rows: int) -> dict[str, int]:
        """rows: those normed at a time, in a layer or for the head."""
        c = self._config
        d = c.d_emb
        return {
            "u": rows * d,
            **dict.fromkeys(("x", "r", "k", "v", "v_first"), tokens * d),
            "mixed": 6 * tokens * d,
            "hidden": tokens * c.d_ffn,
            "decay_space": tokens * c.decay_rank,
            "rate_space": tokens * c.rate_rank,
            "first_space": tokens * c.value_rank,
            "gate_space": tokens * c.gate_rank,
        }

    def _fixed_arguments(self, weights: Weights) -> NDArray[np.void]:
        c = self._config
        a = np.zeros((), step.FORWARD)
        a["d_emb"], a["heads"], a["layers"] = c.d_emb, c.num_heads, c.num_layers
        a["d_ffn"], a["vocab"] = c.d_ffn, c.vocab_size
        a["decay_rank"], a["rate_rank"] = c.decay_rank, c.rate_rank
        a["value_rank"], a["gate_rank"] = c.value_rank, c.gate_rank
        a["norm_eps"], a["group_norm_eps"] = c.norm_eps, c.group_norm_eps
        a["embed"] = weights.embed.data_ptr()
        a["embed_norm"], a["norm"] = _norm(weights.embed_norm), _norm(weights.norm)
        a["head"] = _product(weights.head)
        table = np.array([_layer(layer) for layer in weights.layers], step.LAYER)
        self._kept.append(table)
        a["layer_table"] = table.ctypes.data
        return a


def _layer(layer: Layer) -> tuple[object, ...]:
    """The fields of `step.LAYER`."""
    time, channel = layer.time_mix, layer.channel_mix
    return (
        *(_norm(norm) for norm in (layer.time_norm, time.norm, layer.channel_norm)),
        *(t.data_ptr() for t in (time.shares, time.k_k, time.k_a, time.r_k, channel.share)),
        *(_product(each) for each in (time.receptance, time.key, time.value, time.output)),
        *(_low_rank(each) for each in (time.decay, time.rate, time.first, time.gate)),
        *(_product(each) for each in (channel.key, channel.value)),
    )


def _norm(norm: Norm) -> Addresses:
    """Addresses of the weight and the bias."""
    return norm.weight.data_ptr(), norm.bias.data_ptr()


def _low_rank(maps: LowRank | None) -> tuple[Addresses, Addresses]:
    if maps is None:
        return (0, 0, 0), (0, 0, 0)
    return _product(maps.down), _product(maps.up)


def _product(linear: Linear) -> Addresses:
    """Addresses of the weight, the scale and the bias; 0 if absent."""
    return _packed(linear).addresses


def _packed(linear: Linear) -> PackedLinear:
    if not isinstance(linear, PackedLinear):
        raise TypeError(f"not packed: {linear}")
    return linear
