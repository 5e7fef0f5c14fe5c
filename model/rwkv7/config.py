"""Sizes of an RWKV-7 network, and the layout of a sequence's state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from model.state import StateSpec, TensorSpec

GROUP_NORM_EPS = 64e-5
"""Epsilon of the official implementation, for any head size."""


@dataclass(frozen=True)
class Config:
    """Sizes from the weights' shapes, and settings from the files."""

    vocab_size: int
    d_emb: int
    num_layers: int
    num_heads: int
    head_size: int
    d_ffn: int
    decay_rank: int
    """Rank of the low-rank map to the decays."""

    rate_rank: int
    value_rank: int
    """0 in a single-layer network."""

    gate_rank: int
    norm_eps: float = 1e-5
    group_norm_eps: float = GROUP_NORM_EPS
    bos: int | None = None
    eos: tuple[int, ...] = (0,)

    @property
    def sizes(self) -> Mapping[str, object]:
        return asdict(self)

    @property
    def state_spec(self) -> StateSpec:
        """wkv is `[layers, heads, key channels, value channels]`: the transpose of the published
        layout.

        `last` is the last layer's output for the last token, from which its logits can be
        recomputed.
        """
        layers, heads, n = self.num_layers, self.num_heads, self.head_size
        shifts = ("att_shift", "ffn_shift")
        return StateSpec(
            (
                TensorSpec("last", (1, self.d_emb), "float32", 0.0),
                *(TensorSpec(name, (layers, self.d_emb), "float32", 0.0) for name in shifts),
                TensorSpec("wkv", (layers, heads, n, n), "float32", 0.0),
            )
        )
