"""Tuned initial states: what sequences begin with in place of zeros, learned for a purpose.

Published as `.pth` with `blocks.N.att.time_state` `[heads, value channels, key channels]` of each
layer, as of its wkv: for RWKV-7 they are not transposed, as those of RWKV-5 and 6 are. Token shifts
begin with zeros.
"""

from pathlib import Path

import torch

from model.network import CheckpointError
from model.rwkv7.config import Config
from model.rwkv7.files import read_tensors
from model.state import RowState, StatePool
from model.weights import check_finite, check_shapes


def read(file: Path, config: Config) -> RowState:
    """What `StatePool.write_row` writes. Raises CheckpointError, and OSError."""
    tensors = read_tensors(file)
    heads = (config.num_heads, config.head_size, config.head_size)
    names = [f"blocks.{number}.att.time_state" for number in range(config.num_layers)]
    if not any(name.endswith(".att.time_state") for name in tensors):
        raise CheckpointError(f"{file}: not a tuned initial state: it has no {names[0]}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(shapes, dict.fromkeys(names, heads), file)
    pool = StatePool(config.state_spec, 1, torch.device("cpu"))
    for number, name in enumerate(names):
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}, not floating-point numbers")
        pool.tensors["wkv"][number, 0] = check_finite(name, tensor, file).mT
    return pool.read_row(0)
