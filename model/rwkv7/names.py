"""Tensors of an RWKV-7 network: official names, and those of other implementations.

Names and shapes are the official ones, except that vectors are flat and the low-rank maps (`w1`,
`w2`, ...) are `[out, in]`, like all others.
"""

import re
from collections.abc import Iterator, Mapping

from model.rwkv7.config import Config
from model.weights import TensorShape

MIXED = ("r", "w", "k", "v", "a", "g")
"""Inputs mixed with the previous token, `att.x_*`, in the order of `TimeMix.shares`."""

LOW_RANK = re.compile(r"blocks\.\d+\.att\.[wavg][12]")
VECTOR = re.compile(r"blocks\.\d+\.(?:att\.(?:x_[rwkvag]|[wav]0|k_k|k_a)|ffn\.x_k)")
IGNORED = re.compile(r"blocks\.0\.att\.v[012]")
"""Not used by the first layer, which defines the value itself; some files have them anyway."""

_FLA_TOP = {
    "model.embeddings.weight": "emb.weight",
    "model.norm": "ln_out",
    "lm_head.weight": "head.weight",
}
_FLA_LAYER = {
    "pre_norm": "ln0",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn.g_norm": "att.ln_x",
    "attn.r_proj": "att.receptance",
    "attn.k_proj": "att.key",
    "attn.v_proj": "att.value",
    "attn.o_proj": "att.output",
    "attn": "att",
    "ffn": "ffn",
}
_FLA_LOW_RANK = {"lora.0.weight": "1", "lora.2.weight": "2", "lora.2.bias": "0"}


def from_fla(name: str) -> str:
    """The official name for a name of flash-linear-attention; unknown names are returned
    unchanged."""
    if low_rank := re.fullmatch(r"model\.layers\.(\d+)\.attn\.([wavg])_lora\.(lora\..*)", name):
        number, letter, part = low_rank.groups()
        if part in _FLA_LOW_RANK:
            return f"blocks.{number}.att.{letter}{_FLA_LOW_RANK[part]}"
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
        number, part = layer.groups()
        for theirs, ours in _FLA_LAYER.items():
            if part.startswith(f"{theirs}."):
                return f"blocks.{number}.{ours}{part.removeprefix(theirs)}"
    for theirs, ours in _FLA_TOP.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def num_layers(shapes: Mapping[str, TensorShape]) -> int:
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def expected(config: Config) -> dict[str, TensorShape]:
    """Shapes by name of all tensors of a network with these sizes."""
    top = {"emb.weight": (config.vocab_size, config.d_emb)}
    top["head.weight"] = top["emb.weight"]
    shapes: dict[str, TensorShape] = {**top, **_norm("ln_out", config.d_emb)}
    for number in range(config.num_layers):
        block = f"blocks.{number}."
        shapes |= {block + name: shape for name, shape in _layer(config, number)}
    return shapes


def _layer(c: Config, number: int) -> Iterator[tuple[str, TensorShape]]:
    d, square, vector = c.d_emb, (c.d_emb, c.d_emb), (c.d_emb,)
    for norm in ("ln1", "ln2", "att.ln_x", *(["ln0"] if number == 0 else [])):
        yield from _norm(norm, d).items()
    for name in ("att.receptance", "att.key", "att.value", "att.output"):
        yield f"{name}.weight", square
    for name in (*(f"att.x_{letter}" for letter in MIXED), "att.k_k", "att.k_a", "ffn.x_k"):
        yield name, vector
    yield "att.r_k", (c.num_heads, c.head_size)
    ranks = {"w": c.decay_rank, "a": c.rate_rank, "v": c.value_rank, "g": c.gate_rank}
    for letter, rank in ranks.items():
        if letter == "v" and number == 0:
            continue
        yield f"att.{letter}1", (rank, d)
        yield f"att.{letter}2", (d, rank)
        if letter != "g":
            yield f"att.{letter}0", vector
    yield "ffn.key.weight", (c.d_ffn, d)
    yield "ffn.value.weight", (d, c.d_ffn)


def _norm(name: str, width: int) -> dict[str, TensorShape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
