"""The sizes of the published networks, and the bytes of their states and weights.

    python -m model.rwkv7.published

prints them by the arithmetic of `latentd inspect`, without any of their files. Up to 7.2 B the
numbers of parameters are the published ones; 13.3 B has low-rank maps like 7.2 B,
since it is as wide.
"""

import math
from collections.abc import Iterator

from model import WeightDtype
from model.kernels.linear import DTYPES
from model.rwkv7 import names
from model.rwkv7.config import Config
from model.rwkv7.weights import num_bytes, served_dtype

VOCAB_SIZE, HEAD_SIZE = 65536, 64


def _config(d_emb: int, num_layers: int, decay: int, rate: int, value: int, gate: int) -> Config:
    heads = d_emb // HEAD_SIZE
    ranks = (decay, rate, value, gate)
    return Config(VOCAB_SIZE, d_emb, num_layers, heads, HEAD_SIZE, 4 * d_emb, *ranks)


PUBLISHED = {
    "0.1 B": _config(768, 12, 64, 64, 32, 128),
    "0.4 B": _config(1024, 24, 64, 64, 32, 128),
    "1.5 B": _config(2048, 24, 96, 96, 64, 256),
    "2.9 B": _config(2560, 32, 96, 96, 64, 320),
    "7.2 B": _config(4096, 32, 128, 128, 96, 480),
    "13.3 B": _config(4096, 61, 128, 128, 96, 480),
}


def num_parameters(config: Config) -> int:
    return sum(map(math.prod, names.expected(config).values()))


def weight_bytes(config: Config, dtype: WeightDtype) -> int:
    """Of all weights as they are served, the embedding included."""
    embed = DTYPES[served_dtype("emb.weight", dtype)]
    return num_bytes(config, dtype) + config.vocab_size * config.d_emb * embed.itemsize


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| network | layers | width | parameters | state, bytes | weights in bf16 | in int8 |"
    yield "|---|---|---|---|---|---|---|"
    for name, c in PUBLISHED.items():
        sizes = (c.num_layers, c.d_emb, num_parameters(c), c.state_spec.num_bytes)
        weights = (weight_bytes(c, "bfloat16"), weight_bytes(c, "int8"))
        yield f"| {name} | {' | '.join(f'{number:,}' for number in (*sizes, *weights))} |"


if __name__ == "__main__":
    print("\n".join(table()))
