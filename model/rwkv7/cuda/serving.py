"""The network that serves on a GPU: all products and what is between them are kernels."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch
from model.kernels.cuda.graphs import to_device
from model.kernels.cuda.linear import linear
from model.kernels.cuda.rows import write_rows
from model.kernels.linear import NarrowLinear
from model.rwkv7.config import Config
from model.rwkv7.cuda import step
from model.rwkv7.cuda.recurrence import fused
from model.rwkv7.layers import ChannelMix, Linear, LowRank, TimeMix, Weights
from model.rwkv7.pieces import read_group
from model.state import StatePool

T = TypeVar("T")


class KernelLinear(NarrowLinear):
    """A `NarrowLinear` with the same tensors, whose products are Triton's."""

    def __init__(self, plain: NarrowLinear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = plain.weight, plain.bias, plain.scale

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.scale)
        return y.view(*x.shape[:-1], -1)


class FusedNetwork:
    """The `Recordable`. Single tokens are read by kernels alone, longer pieces as in plain torch
    with the recurrence and the products as kernels."""

    def __init__(self, config: Config, weights: Weights) -> None:
        """The linear maps are `NarrowLinear`."""
        self.vocab_size = config.vocab_size
        self._spec = config.state_spec
        self._d_emb = config.d_emb
        self._weights = _with_kernels(weights)

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """`Recordable.decode`: without a look at any number, for a CUDA graph."""
        self._check(pool)
        return self._head(self._step(token_ids, rows, pool), logits)

    def forward(
        self, batch: Batch, pool: StatePool, single: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`Recordable.forward`."""
        self._check(pool)
        batch.check(self.vocab_size, pool.num_rows)
        x = torch.empty(len(batch.token_ids), self._d_emb, device=pool.device)
        [singles] = np.nonzero(batch.lengths == 1)
        if len(singles):
            places = batch.starts[singles]
            given = (batch.token_ids[places], np.array(batch.rows)[singles])
            ids, rows = single or (
                to_device(each.tolist(), torch.int32, pool.device) for each in given
            )
            x[to_device(places.tolist(), torch.int64, pool.device)] = self._step(ids, rows, pool)
        for group in batch.groups():
            if batch.lengths[group[0]] > 1:
                read_group(self._weights, batch, group, pool, fused, x)
        return self._head(x[to_device(batch.logits_at.tolist(), torch.int64, pool.device)])

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`Recordable.logits`."""
        self._check(pool)
        index = to_device(pool.index(rows).tolist(), torch.int64, pool.device)
        return self._head(pool.tensors["last"][0].index_select(0, index))

    def _step(self, token_ids: Tensor, rows: Tensor, pool: StatePool) -> Tensor:
        """What the last layer makes of a token of each row `[batch, d_emb]`, also in `last`."""
        weights, state = self._weights, pool.tensors
        x, v_first = step.embed(weights.embed, token_ids, weights.embed_norm), None
        for number, layer in enumerate(weights.layers):
            mixed = step.mix(
                x, layer.time_norm, layer.time_mix.shares, state["att_shift"][number], rows
            )
            y, v_first = _time_mix(layer.time_mix, mixed, v_first, state["wkv"][number], rows)
            x = _add(layer.time_mix.output, y, x)
            mix: ChannelMix = layer.channel_mix
            shares, before = mix.share.unsqueeze(0), state["ffn_shift"][number]
            [mixed_x] = step.mix(x, layer.channel_norm, shares, before, rows)
            x = _add(mix.value, mix.key(mixed_x).relu_().square_(), x)
        write_rows(x, state["last"][0], rows)
        return x

    def _head(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        head = self._weights.head
        # The norm is not the product kernel's, which would not fit its registers in 2,560 channels.
        return linear(self._weights.norm(x), head.weight, head.bias, head.scale, out=out)

    def _check(self, pool: StatePool) -> None:
        if pool.spec != self._spec:
            raise ValueError("the pool was not made by this network's new_pool")


def _time_mix(
    mix: TimeMix, mixed: Tensor, v_first: Tensor | None, states: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What goes into `output`, and layer 0's value."""
    xr, xw, xk, xv, xa, xg = mixed
    v = mix.value(xv)
    vectors = (
        *(mix.receptance(xr), mix.decay.up(mix.decay.down(xw).tanh_()), mix.key(xk), v),
        *(_up_down(mix.rate, xa), mix.gate.up(mix.gate.down(xg).sigmoid_())),
    )
    if mix.first is None or v_first is None:
        return step.time_mix(mix, vectors, None, states, rows), v
    firsts = v_first, _up_down(mix.first, xv)
    return step.time_mix(mix, vectors, firsts, states, rows), v_first


def _up_down(maps: LowRank, x: Tensor) -> Tensor:
    result: Tensor = maps.up(maps.down(x))
    return result


def _add(linear_map: Linear, x: Tensor, residual: Tensor) -> Tensor:
    weight, bias, scale = linear_map.weight, linear_map.bias, linear_map.scale
    return linear(x, weight, bias, scale, residual=residual)


def _with_kernels(part: T) -> T:
    """The same weights, with `KernelLinear` in place of each `NarrowLinear`."""
    changed: Any = part
    if isinstance(part, NarrowLinear):
        changed = KernelLinear(part)
    elif isinstance(part, tuple):
        changed = tuple(map(_with_kernels, part))
    elif is_dataclass(part) and not isinstance(part, type):
        values = {each.name: _with_kernels(getattr(part, each.name)) for each in fields(part)}
        changed = replace(part, **values)
    result: T = changed
    return result
