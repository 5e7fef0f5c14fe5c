"""RWKV-7 as a family: detecting, describing and loading its checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import WeightDtype
from model.files import read_file
from model.network import CheckpointError, Description, Loaded, checkpoint_errors
from model.rwkv7.files import CONFIG, NetworkFiles, open_source
from model.rwkv7.initial_state import initial_state as initial_state
from model.rwkv7.network import RWKV7
from model.rwkv7.weights import Builder
from model.state import StatePool
from model.text import g1, world
from model.text.tokenizer import Tokenizer, TokenizerError

name = "rwkv7"

CHAT_TEMPLATE = "chat_template.jinja"

DTYPES: dict[torch.dtype, WeightDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "bfloat16",
}
"""Serving dtype by stored dtype. bfloat16 is as small as float16 and has the range of float32, but
drops three bits of float16's precision; float32 drops none."""


def matches(path: Path) -> bool:
    """A `.pth`, or a folder whose config names any version of RWKV."""
    if path.suffix == ".pth":
        return path.is_file()
    try:
        config = json.loads(read_file(path / CONFIG))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and str(config.get("model_type")).startswith("rwkv")


@checkpoint_errors()
def files(path: Path) -> tuple[Path, ...]:
    """Files that determine which states are compatible."""
    return *open_source(path).files, world.vocabulary_file(_folder(path))


@checkpoint_errors()
def describe(path: Path) -> Description:
    """Describe without reading weights; the tokenizer may be missing. Raises CheckpointError."""
    source = open_source(path)
    try:
        words = _read_tokenizer(source)
    except (CheckpointError, TokenizerError):
        words = None
    return Description(
        sizes=source.config.sizes,
        num_parameters=source.num_parameters,
        weight_bytes=source.num_bytes,
        weight_dtypes=source.dtype_names,
        vocab_size=source.config.vocab_size,
        state_spec=source.config.state_spec,
        tokenizer=words,
        chat_template=_read_template(path),
    )


@checkpoint_errors()
def load(path: Path, device: torch.device, dtype: WeightDtype | None = None) -> Loaded[RWKV7]:
    """Load a network for inference, by default with weights in the file's dtype.

    Raises CheckpointError.
    """
    source = open_source(path)
    words = _read_tokenizer(source)
    ends = {*source.config.eos, *words.special_tokens.values()}
    source = replace(source, config=replace(source.config, eos=tuple(sorted(ends))))
    return Loaded(build(source, device, dtype), words, _read_template(path))


@checkpoint_errors()
def load_network(
    path: Path, device: torch.device, dtype: WeightDtype | None = None, *, plain: bool = False
) -> RWKV7:
    """The network alone; `plain`: in plain torch. Raises CheckpointError."""
    return build(open_source(path), device, dtype, plain=plain)


def published_state(pool: StatePool, row: int) -> dict[str, Tensor]:
    """att_shift, ffn_shift `[layers, d_emb]`, wkv `[layers, heads, values, keys]`."""
    att_shift, ffn_shift, wkv = (
        pool.tensors[name][:, row] for name in ("att_shift", "ffn_shift", "wkv")
    )
    return {"att_shift": att_shift, "ffn_shift": ffn_shift, "wkv": wkv.mT}


def build(
    source: NetworkFiles,
    device: torch.device,
    dtype: WeightDtype | None = None,
    *,
    plain: bool = False,
) -> RWKV7:
    """Raises CheckpointError for weights that are not finite."""
    dtype = dtype or DTYPES[source.dtypes["blocks.0.att.key.weight"]]
    builder = Builder(source, device, dtype, plain=plain)
    weights = builder.weights()
    return RWKV7(
        source.config, weights, dtype, builder.num_parameters, builder.num_bytes, builder.why_plain
    )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _read_template(path: Path) -> str:
    """The template next to the weights, else that of the G1 series."""
    template = _folder(path) / CHAT_TEMPLATE
    try:
        return read_file(template).decode() if template.exists() else g1.TEMPLATE
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{template}: not UTF-8 text: {error}") from error


def _read_tokenizer(source: NetworkFiles) -> Tokenizer:
    """The World vocabulary next to the weights, or of an installed package."""
    words = world.find(_folder(source.path))
    if words.num_tokens > source.config.vocab_size:
        raise CheckpointError(
            f"{source.path}: the tokenizer has {words.num_tokens:,} tokens, but the network only "
            f"{source.config.vocab_size:,}"
        )
    return words
