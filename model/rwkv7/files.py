"""Published file formats of RWKV-7 networks, opened without reading weights.

*.pth             the official format: a dict of tensors, mapped into memory
config.json       with `model_type` rwkv7, next to model.safetensors, or several and their index:
                  flash-linear-attention's format for Hugging Face's libraries
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

from model.files import check_file, read_file
from model.network import CheckpointError
from model.rwkv7 import names
from model.rwkv7.config import Config
from model.weights import TensorShape, check_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ZIP, PICKLE = b"PK", b"\x80\x02"
"""What files begin with that torch saves, in its present format and in the one before."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Weight dtypes, by their safetensors names."""

MARKS = {
    ".qkv.": "RWKV-7b, which has a cache of all tokens in addition to its state",
    ".ffn.s_emb": "RWKV-7a, which has an embedding of each token in every layer",
    ".ffn.enn.": "RWKV-8, which has an embedding of each token in every layer",
    "rosa": "RWKV-8, which looks up what followed the same tokens before",
    ".att.time_maa": "RWKV-6, with another recurrence",
    ".att.time_mix_g": "RWKV-5, with another recurrence",
    ".att.ln_x": "RWKV-5, with another recurrence",
    ".att.time_decay": "RWKV-4, with another recurrence",
    ".att.time_state": "a tuned initial state of a network, not a network",
}
"""Name fragments of other networks than RWKV-7, in this order."""

VERSIONS = {
    "rwkv": "RWKV-4, with another recurrence",
    "rwkv5": "RWKV-5, with another recurrence",
    "rwkv6": "RWKV-6, with another recurrence",
}
"""By `model_type`. Other types that begin with rwkv are unknown."""


@dataclass(frozen=True)
class NetworkFiles:
    """A network's tensors in their files."""

    path: Path
    files: tuple[Path, ...]
    """Files of the network, the config first."""

    shapes: Mapping[str, TensorShape]
    """Shapes by the names of `names.expected`."""

    dtypes: Mapping[str, torch.dtype]
    config: Config
    tensor: Callable[[str], Tensor]
    """The named tensor in that shape, memory-mapped if the format allows."""

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def dtype_names(self) -> list[str]:
        """Safetensors names of the dtypes."""
        found = set(self.dtypes.values())
        return [name for name, dtype in DTYPES.items() if dtype in found]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files if file.suffix != ".json")


def open_source(path: Path) -> NetworkFiles:
    """Raises CheckpointError with a one-line reason, and OSError."""
    source = _open_folder(path) if path.is_dir() else _open_pth(path)
    check_shapes(source.shapes, names.expected(source.config), source.path)
    return source


def _open_pth(path: Path) -> NetworkFiles:
    tensors = read_tensors(path)
    _refuse_others(tensors, path)
    found = {
        name: _arranged(name, tensor)
        for name, tensor in tensors.items()
        if not names.IGNORED.fullmatch(name)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    dtypes = {name: _known_dtype(name, tensor.dtype, path) for name, tensor in found.items()}
    return NetworkFiles(path, (path,), shapes, dtypes, _config(shapes, path), found.__getitem__)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A dict of tensors, memory-mapped; no code from the file is run.

    Raises CheckpointError, and OSError if the file cannot be opened.
    """
    _check_format(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many types for a malformed or foreign file
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a file of plain tensors: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: not a dict of tensors by name")
    if "_strategy" in content:
        raise CheckpointError(
            f"{path}: weights converted for a strategy of the package rwkv; use the original file"
        )
    if others := [name for name, tensor in content.items() if not isinstance(tensor, Tensor)]:
        raise CheckpointError(f"{path}: {others[0]} is not a tensor")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain tensor")
    # A view may have any shape, and any number of views the same numbers: a head those of an
    # embedding, but not more.
    num_bytes, most = sum(tensor.nbytes for tensor in content.values()), 2 * path.stat().st_size
    if num_bytes > most:
        raise CheckpointError(
            f"{path}: its tensors would take {num_bytes} bytes, more than twice those of the file"
        )
    return content


def _check_format(path: Path) -> None:
    """Raises CheckpointError for what torch would not map into memory, and OSError."""
    check_file(path)  # not every error of torch would name the file
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == PICKLE:
        raise CheckpointError(
            f"{path}: in torch's legacy format, which cannot be mapped into memory: load it and "
            "save it again with torch.save"
        )
    if magic != ZIP:
        raise CheckpointError(f"{path}: not a file of plain tensors, which is a zip archive")


def _arranged(name: str, tensor: Tensor) -> Tensor:
    """An official tensor in the shape of `names.expected`, if possible."""
    if names.LOW_RANK.fullmatch(name) and tensor.dim() == 2:
        return tensor.T
    return _flat(name, tensor)


def _flat(name: str, tensor: Tensor) -> Tensor:
    is_vector = names.VECTOR.fullmatch(name) and tensor.numel() == max(tensor.shape, default=0)
    return tensor.flatten() if is_vector else tensor


def _open_folder(folder: Path) -> NetworkFiles:
    settings = _read_json(folder / CONFIG)
    _refuse_settings(settings, folder / CONFIG)
    files = _weight_files(folder)
    shapes: dict[str, TensorShape] = {}
    dtypes: dict[str, torch.dtype] = {}
    places: dict[str, tuple[Any, str]] = {}
    for file in files:
        handle = _open_safetensors(file)
        for theirs in handle.keys():  # noqa: SIM118
            name = names.from_fla(theirs)
            part = handle.get_slice(theirs)
            shape = tuple(part.get_shape())
            if names.VECTOR.fullmatch(name) and len(shape) > 1:
                shape = tuple(size for size in shape if size != 1)
            if name in places:
                raise CheckpointError(f"{file}: {theirs} is in more than one file")
            shapes[name], places[name] = shape, (handle, theirs)
            dtypes[name] = _known_dtype(theirs, part.get_dtype(), file)
    _refuse_others(shapes, folder)
    if settings.get("tie_word_embeddings"):
        _tie(shapes, dtypes, places)

    def tensor(name: str) -> Tensor:
        handle, theirs = places[name]
        return cast("Tensor", handle.get_tensor(theirs)).view(shapes[name])

    config = _with_settings(_config(shapes, folder), settings, folder / CONFIG)
    index = folder / INDEX
    named = (folder / CONFIG, *([index] if index.exists() else []), *files)
    return NetworkFiles(folder, named, shapes, dtypes, config, tensor)


def _tie(shapes: dict[str, TensorShape], *others: dict[str, Any]) -> None:
    for each in (shapes, *others):
        if "emb.weight" in each:
            each["head.weight"] = each["emb.weight"]


def _open_safetensors(path: Path) -> Any:
    check_file(path)  # not every library error names the file
    try:
        return safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """One file, or those of the index. Raises CheckpointError for a malformed index."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return (folder / WEIGHTS,)
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{index}: has no weight_map of file names")
    file_names = sorted(set(placed.values()))
    if outside := [name for name in file_names if Path(name).name != name]:
        raise CheckpointError(f"{index}: {outside[0]!r} is not the name of a file in the folder")
    return tuple(folder / name for name in file_names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _refuse_settings(settings: Mapping[str, Any], path: Path) -> None:
    kind = settings.get("model_type")
    if kind != "rwkv7":
        what = VERSIONS.get(str(kind), f"model_type {kind!r}, which is unknown")
        raise CheckpointError(f"{path}: {what}; only RWKV-7 is served")
    if quantized := settings.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{path}: quantised weights ({method or 'of an unknown method'}) are not supported: "
            "serve the original, with --dtype int8 to save memory"
        )
    plain = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None}
    for key, value in plain.items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} is {json.dumps(settings[key])}; only {json.dumps(value)} is served"
            )


def _refuse_others(found: Mapping[str, object], path: Path) -> None:
    """Raises CheckpointError for tensors of another network."""
    for mark, what in MARKS.items():
        if name := next((name for name in found if mark in name), None):
            if mark == ".att.ln_x" and any(".att.r_k" in each for each in found):
                continue
            raise CheckpointError(f"{path}: {what} (it has {name}); only RWKV-7 is served")


def _known_dtype(name: str, dtype: object, path: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    found = str(dtype).removeprefix("torch.")
    why = "" if found in ("float64", "F64") else "quantised weights are not supported, "
    raise CheckpointError(f"{path}: {name} is {found}: {why}only float32, float16 and bfloat16")


def _config(shapes: Mapping[str, TensorShape], path: Path) -> Config:
    """Sizes from the tensors' shapes. Raises CheckpointError if one is missing."""

    def sizes(name: str) -> tuple[int, int]:
        shape = shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{path}: not an RWKV-7 network: it has no {name}")
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{path}: {name} is {list(shape)}, not a matrix")
        return shape[0], shape[1]

    num_layers = names.num_layers(shapes)
    vocab_size, d_emb = sizes("emb.weight")
    num_heads, head_size = sizes("blocks.0.att.r_k")
    if num_layers > len(shapes):
        raise CheckpointError(f"{path}: {num_layers} layers, but {len(shapes)} tensors")
    if num_heads * head_size != d_emb:
        raise CheckpointError(
            f"{path}: {num_heads} heads of {head_size} are not the embedding's {d_emb} channels"
        )
    return Config(
        vocab_size=vocab_size,
        d_emb=d_emb,
        num_layers=num_layers,
        num_heads=num_heads,
        head_size=head_size,
        d_ffn=sizes("blocks.0.ffn.key.weight")[0],
        decay_rank=sizes("blocks.0.att.w1")[0],
        rate_rank=sizes("blocks.0.att.a1")[0],
        value_rank=sizes("blocks.1.att.v1")[0] if num_layers > 1 else 0,
        gate_rank=sizes("blocks.0.att.g1")[0],
    )


def _with_settings(config: Config, settings: Mapping[str, Any], path: Path) -> Config:
    """Adds what only `config.json` has, after checking that it agrees with the shapes."""
    by_shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_emb,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "intermediate_size": config.d_ffn,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.rate_rank,
        "gate_low_rank_dim": config.gate_rank,
    }
    if settings.get("head_dim") is None:
        by_shape["num_heads"] = config.num_heads
    if config.num_layers > 1:
        by_shape["v_low_rank_dim"] = config.value_rank
    for key, size in by_shape.items():
        if (said := settings.get(key)) is not None and said != size:
            raise CheckpointError(f"{path}: {key} is {said!r}, but the weights are for {size}")
    eps = settings.get("norm_eps", 1e-5)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise CheckpointError(f"{path}: norm_eps is {eps!r}, not a small number")
    return replace(
        config,
        norm_eps=float(eps),
        group_norm_eps=config.head_size * float(eps),
        eos=_eos(settings.get("eos_token_id"), config.vocab_size, path),
    )


def _eos(said: object, vocab_size: int, path: Path) -> tuple[int, ...]:
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(each, int) and 0 <= each < vocab_size for each in ids):
        raise CheckpointError(f"{path}: eos_token_id {said!r} is not below {vocab_size}")
    return tuple(ids)
