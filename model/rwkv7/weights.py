"""Loads weights tensor by tensor, converting each to its serving dtype."""

import math
import re

import torch
from torch import Tensor

from model import WeightDtype
from model.kernels.linear import (
    DTYPES,
    NarrowLinear,
    PackedLinear,
    as_served,
    narrow,
    reason_not_compiled,
)
from model.rwkv7 import names
from model.rwkv7.config import Config
from model.rwkv7.files import NetworkFiles
from model.rwkv7.layers import ChannelMix, Layer, Linear, LowRank, Norm, TimeMix, Weights
from model.weights import check_finite

AS_ASKED = "as asked for"

DECAY = re.compile(r"blocks\.\d+\.att\.w[12]")
MATRICES = (
    *("emb.weight", "head.weight", "ffn.key.weight", "ffn.value.weight"),
    *(f"att.{name}.weight" for name in ("receptance", "key", "value", "output")),
)
"""Ends of the names of all matrices that are not of low rank."""


def served_dtype(name: str, dtype: WeightDtype) -> WeightDtype:
    """What a tensor is served in. Vectors, decays and what they are made of stay float32; with
    int8, other low-rank maps and the embedding are bfloat16."""
    if DECAY.fullmatch(name) or not (name.endswith(MATRICES) or names.LOW_RANK.fullmatch(name)):
        return "float32"
    is_small = name == "emb.weight" or names.LOW_RANK.fullmatch(name)
    return "bfloat16" if is_small and dtype == "int8" else dtype


def num_bytes(config: Config, dtype: WeightDtype) -> int:
    """Bytes of the weights that a step reads, as `Builder.num_bytes`."""
    return sum(
        math.prod(shape) * DTYPES[served_dtype(name, dtype)].itemsize
        for name, shape in names.expected(config).items()
        if name != "emb.weight"
    )


class Builder:
    """Reads each tensor once, into the dtype that `served_dtype` says."""

    def __init__(
        self, source: NetworkFiles, device: torch.device, dtype: WeightDtype, *, plain: bool = False
    ) -> None:
        self._source, self._device, self._dtype = source, device, dtype
        self.why_plain = AS_ASKED if plain else reason_not_compiled(device, torch.float32)
        """Why the network is not compiled; nothing if it is."""

        self._kind = NarrowLinear if self.why_plain else PackedLinear
        self.num_parameters = self.num_bytes = 0
        """Bytes of weights read per step: all but the embedding."""

    def weights(self) -> Weights:
        """Raises CheckpointError for weights that are not finite."""
        c = self._source.config
        return Weights(
            embed=self._embed(),
            embed_norm=self._norm("blocks.0.ln0"),
            layers=tuple(self._layer(number) for number in range(c.num_layers)),
            norm=self._norm("ln_out"),
            head=self._linear("head.weight"),
        )

    def _layer(self, number: int) -> Layer:
        block, c = f"blocks.{number}", self._source.config
        att, ffn = f"{block}.att", f"{block}.ffn"
        time_mix = TimeMix(
            shares=torch.stack([self._vector(f"{att}.x_{letter}") for letter in names.MIXED]),
            receptance=self._linear(f"{att}.receptance.weight"),
            key=self._linear(f"{att}.key.weight"),
            value=self._linear(f"{att}.value.weight"),
            output=self._linear(f"{att}.output.weight"),
            decay=self._low_rank(f"{att}.w"),
            rate=self._low_rank(f"{att}.a"),
            first=self._low_rank(f"{att}.v") if number else None,
            gate=self._low_rank(f"{att}.g", has_bias=False),
            k_k=self._vector(f"{att}.k_k"),
            k_a=self._vector(f"{att}.k_a"),
            r_k=self._vector(f"{att}.r_k"),
            norm=self._norm(f"{att}.ln_x", c.group_norm_eps),
        )
        channel_mix = ChannelMix(
            self._vector(f"{ffn}.x_k"),
            self._linear(f"{ffn}.key.weight"),
            self._linear(f"{ffn}.value.weight"),
        )
        time_norm, channel_norm = self._norm(f"{block}.ln1"), self._norm(f"{block}.ln2")
        return Layer(time_norm, time_mix, channel_norm, channel_mix)

    def _embed(self) -> Tensor:
        weight = self._tensor("emb.weight")
        dtype = served_dtype("emb.weight", self._dtype)
        narrowed, _ = narrow(weight, dtype, self._device)
        is_mapped = narrowed.data_ptr() == weight.data_ptr()
        return narrowed.clone() if is_mapped else narrowed  # a mapped file may change

    def _linear(self, name: str, bias: Tensor | None = None) -> Linear:
        weight = self._tensor(name)
        linear = self._kind(weight, bias, served_dtype(name, self._dtype), self._device)
        self.num_bytes += weight.numel() * linear.weight.itemsize
        return linear

    def _low_rank(self, name: str, *, has_bias: bool = True) -> LowRank:
        bias = self._vector(f"{name}0") if has_bias else None
        return LowRank(self._linear(f"{name}1"), self._linear(f"{name}2", bias))

    def _norm(self, name: str, eps: float | None = None) -> Norm:
        eps = self._source.config.norm_eps if eps is None else eps
        return Norm(self._vector(f"{name}.weight"), self._vector(f"{name}.bias"), eps)

    def _vector(self, name: str) -> Tensor:
        vector = as_served(self._tensor(name), self._device).clone()
        self.num_bytes += vector.nbytes
        return vector

    def _tensor(self, name: str) -> Tensor:
        tensor = check_finite(name, self._source.tensor(name), self._source.path)
        self.num_parameters += tensor.numel()
        return tensor
