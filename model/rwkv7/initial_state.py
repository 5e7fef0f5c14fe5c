"""Tuned initial states: learned values that sequences start from in place of zeros.

Published as `.pth` with `blocks.N.att.time_state` `[heads, value channels, key channels]` per
layer, in the layout of its wkv: unlike those of RWKV-5 and 6, they are not transposed for RWKV-7.
Token shifts start from zeros.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.network import CheckpointError
from model.state import StateSpec
from model.weights import check_finite, check_shapes


def initial_state(
    tensors: Mapping[str, Tensor], spec: StateSpec, source: Path
) -> Mapping[str, Tensor]:
    """The state's `wkv` `[layers, heads, key channels, value channels]`.

    Raises CheckpointError for the state of another network or for something else.
    """
    if not any(name.endswith(".att.time_state") for name in tensors):
        raise CheckpointError(f"{source}: not a tuned initial state: it has no .att.time_state")
    [(layers, *heads)] = (tensor.shape for tensor in spec.tensors if tensor.name == "wkv")
    names = [f"blocks.{number}.att.time_state" for number in range(layers)]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(shapes, dict.fromkeys(names, heads), source)
    return {"wkv": torch.stack([check_finite(n, tensors[n], source).mT.float() for n in names])}
