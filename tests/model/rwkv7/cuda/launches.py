"""Calls of kernels whose launches `tests.model.kernels.cuda.compiled` compiles for a GPU.

Each calls as a network of a published size is called in serving.
"""

from collections.abc import Callable

import torch

from model import WeightDtype
from model.batch import Batch
from model.rwkv7.config import Config
from model.rwkv7.cuda.serving import FusedNetwork
from model.rwkv7.published import PUBLISHED
from tests.model.rwkv7 import networks


def serve(config: Config, dtype: WeightDtype) -> None:
    """One layer with a value of another: a step, and a batch of prompts and single tokens."""
    network = FusedNetwork(config, networks.network(config, dtype, plain=True).weights)
    pool = networks.network(config, dtype, plain=True).new_pool(4)
    ids, rows = torch.zeros(2, 3, dtype=torch.int32)
    network.decode(ids, rows, pool)
    network.forward(Batch.of([[1], [2, 3, 4]], [0, 1]).wanting([0, 3]), pool)


def small(width: int) -> Config:
    """Two layers of a published width, and few tokens."""
    found = next(c for c in PUBLISHED.values() if c.d_emb == width)
    return Config(
        64, found.d_emb, 2, found.num_heads, found.head_size, 2 * found.d_emb,
        found.decay_rank, found.rate_rank, found.value_rank, found.gate_rank,
    )  # fmt: skip


LAUNCHES: dict[str, Callable[[], None]] = {
    "0.1 B in float32": lambda: serve(small(768), "float32"),
    "0.1 B in bfloat16": lambda: serve(small(768), "bfloat16"),
    "0.1 B in int8": lambda: serve(small(768), "int8"),
    "2.9 B in bfloat16": lambda: serve(small(2560), "bfloat16"),
}
