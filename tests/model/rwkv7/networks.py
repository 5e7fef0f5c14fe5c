"""Small random networks in the published formats, and the definition in float64."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from model import WeightDtype
from model.rwkv7 import names
from model.rwkv7.checkpoint import build
from model.rwkv7.config import Config
from model.rwkv7.files import NetworkFiles
from model.rwkv7.network import RWKV7

CPU = torch.device("cpu")
SMALL = Config(
    vocab_size=500,
    d_emb=128,
    num_layers=3,
    num_heads=2,
    head_size=64,
    d_ffn=200,
    decay_rank=8,
    rate_rank=24,
    value_rank=16,
    gate_rank=70,
)
Array = NDArray[np.float64]
Weights = dict[str, Tensor]


def weights(config: Config, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights by the names of `names.expected`, with varied decays and replacement rates."""
    chance = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in names.expected(config).items():
        values = torch.randn(shape, generator=chance)
        last = name.rpartition(".")[2]
        if name.endswith(("ln_x.weight", "ln0.weight", "ln1.weight", "ln2.weight", "out.weight")):
            values = 1 + values / 10
        elif last == "bias":
            values /= 10
        elif last.startswith("x_"):
            values = torch.rand(shape, generator=chance)
        elif last in ("w0", "a0", "v0"):
            values -= 1
        elif last in ("k_k", "k_a"):
            values = 0.8 + values / 10
        elif last == "r_k":
            values /= 10
        elif len(shape) == 2 and name != "emb.weight":
            values *= 1.5 * shape[1] ** -0.5
        made[name] = values.to(dtype)
    return made


def source(config: Config, made: Weights | None = None) -> NetworkFiles:
    """A source as if opened from a file."""
    made = weights(config) if made is None else made
    return NetworkFiles(
        path=Path("random.pth"),
        files=(),
        shapes={name: tuple(tensor.shape) for name, tensor in made.items()},
        dtypes={name: tensor.dtype for name, tensor in made.items()},
        config=config,
        tensor=made.__getitem__,
    )


def network(
    config: Config = SMALL,
    dtype: WeightDtype = "float32",
    plain: bool = False,
    device: torch.device = CPU,
) -> RWKV7:
    return build(source(config), device, dtype, plain=plain)


def official(made: Weights) -> Weights:
    """The tensors as in a `.pth`."""
    tensors = {}
    for name, tensor in made.items():
        if names.LOW_RANK.fullmatch(name):
            tensor = tensor.T.contiguous()
        elif names.VECTOR.fullmatch(name):
            tensor = tensor.view(1, 1, -1)
        tensors[name] = tensor
    for letter in "012":  # present, but not used
        tensors[f"blocks.0.att.v{letter}"] = tensors[f"blocks.0.att.a{letter}"]
    return tensors


def save_pth(path: Path, made: Weights) -> Path:
    torch.save(official(made), path)
    return path


def save_with_vocabulary(folder: Path) -> Path:
    """A `.pth` of 300 tokens next to a vocabulary of all bytes and a few words."""
    tokens = [*(bytes([byte]) for byte in range(256)), b" the", b" cat", b" sat", b" mat"]
    lines = (f"{i} {token!r} {len(token)}" for i, token in enumerate(tokens, 1))
    folder.mkdir()
    (folder / "rwkv_vocab_test.txt").write_text("\n".join(lines) + "\n")
    config = replace(SMALL, vocab_size=300, d_emb=64, num_heads=1)
    return save_pth(folder / "model.pth", weights(config))


def fla(made: Weights) -> Weights:
    """The tensors under flash-linear-attention's names."""
    parts = {
        "att.receptance": "attn.r_proj",
        "att.key": "attn.k_proj",
        "att.value": "attn.v_proj",
        "att.output": "attn.o_proj",
        "att.ln_x": "attn.g_norm",
        "att": "attn",
        "ln0": "pre_norm",
        "ln1": "attn_norm",
        "ln2": "ffn_norm",
    }
    low_rank = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
    top = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    found = {}
    for name, tensor in made.items():
        if not name.startswith("blocks."):
            first, _, last = name.partition(".")
            found[f"{top[first]}.{last}"] = tensor
            continue
        _, number, part = name.split(".", 2)
        last = part.removeprefix("att.")
        if len(last) == 2 and last[0] in "wavg" and last[1] in "012":
            part = f"attn.{last[0]}_lora.{low_rank[last[1]]}"
        else:
            ours = next((each for each in parts if part.startswith(f"{each}.")), None)
            part = part if ours is None else parts[ours] + part.removeprefix(ours)
        shape = (1, 1, -1) if part.startswith("attn.x_") else tensor.shape
        found[f"model.layers.{number}.{part}"] = tensor.reshape(shape)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save_hf(
    folder: Path, config: Config, made: Weights, num_shards: int = 1, **reported: object
) -> Path:
    """A folder in Hugging Face's format."""
    folder.mkdir()
    settings = {
        "model_type": "rwkv7",
        "hidden_size": config.d_emb,
        "head_dim": config.head_size,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "hidden_act": "sqrelu",
        "attn": None,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(settings | reported))
    tensors = fla(made)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = dict[str, str]()
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / file_name)
        places |= dict.fromkeys(part, file_name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


class Definition:
    """The network by its definition, token by token in float64, for one sequence."""

    def __init__(self, config: Config, made: Weights) -> None:
        self.c, self._w = config, {name: t.double().numpy() for name, t in made.items()}
        layers, heads, n = config.num_layers, config.num_heads, config.head_size
        self.att_shift: Array = np.zeros((layers, config.d_emb))
        self.ffn_shift: Array = np.zeros((layers, config.d_emb))
        self.wkv: Array = np.zeros((layers, heads, n, n))

    def read(self, token_id: int) -> Array:
        """The logits after the token."""
        x = self._norm("blocks.0.ln0", self._w["emb.weight"][token_id])
        v_first: Array | None = None
        for layer in range(self.c.num_layers):
            block = f"blocks.{layer}"
            added, v_first = self._time_mix(layer, self._norm(f"{block}.ln1", x), v_first)
            x = x + added
            u = self._norm(f"{block}.ln2", x)
            mixed = u + (self.ffn_shift[layer] - u) * self._w[f"{block}.ffn.x_k"]
            self.ffn_shift[layer] = u
            hidden = np.maximum(self._w[f"{block}.ffn.key.weight"] @ mixed, 0) ** 2
            x = x + self._w[f"{block}.ffn.value.weight"] @ hidden
        return np.asarray(self._w["head.weight"] @ self._norm("ln_out", x))

    def _time_mix(self, layer: int, u: Array, v_first: Array | None) -> tuple[Array, Array]:
        heads = (self.c.num_heads, self.c.head_size)
        w = {
            name.rpartition("att.")[2]: value
            for name, value in self._w.items()
            if name.startswith(f"blocks.{layer}.att.")
        }
        shift = self.att_shift[layer] - u
        xr, xw, xk, xv, xa, xg = (u + shift * w[f"x_{letter}"] for letter in "rwkvag")
        self.att_shift[layer] = u
        r, k, v = w["receptance.weight"] @ xr, w["key.weight"] @ xk, w["value.weight"] @ xv
        decay = np.exp(-np.exp(-0.5) * _sigmoid(w["w0"] + w["w2"] @ np.tanh(w["w1"] @ xw)))
        rate = _sigmoid(w["a0"] + w["a2"] @ (w["a1"] @ xa))
        gate = w["g2"] @ _sigmoid(w["g1"] @ xg)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * _sigmoid(w["v0"] + w["v2"] @ (w["v1"] @ xv))
        kk = (k * w["k_k"]).reshape(heads)
        kk = kk / np.maximum(np.sqrt((kk**2).sum(1, keepdims=True)), 1e-12)
        k = k * (1 + (rate - 1) * w["k_a"])
        parts = []
        for head in range(heads[0]):
            h = slice(head * heads[1], (head + 1) * heads[1])
            s = self.wkv[layer, head]
            s = s * decay[h] - (s @ kk[head])[:, None] * (kk[head] * rate[h])
            s = s + v[h][:, None] * k[h]
            self.wkv[layer, head] = s
            y = s @ r[h]
            y = (y - y.mean()) / np.sqrt(y.var() + self.c.group_norm_eps)
            y = y * w["ln_x.weight"][h] + w["ln_x.bias"][h]
            parts.append(y + (r[h] * k[h] * w["r_k"][head]).sum() * v[h])
        return w["output.weight"] @ (np.concatenate(parts) * gate), v_first

    def _norm(self, name: str, x: Array) -> Array:
        normed = (x - x.mean()) / np.sqrt(x.var() + self.c.norm_eps)
        return np.asarray(normed * self._w[f"{name}.weight"] + self._w[f"{name}.bias"])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))
