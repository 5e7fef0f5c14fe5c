"""A checkpoint: a folder with everything that it takes to serve a model.

config.json           the arguments of ModelConfig
model.safetensors     the weights, under the reference implementation's parameter names
tokenizer.json        the format of the `tokenizers` library
chat_template.jinja   messages to prompt text; optional
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from model import WeightDtype
from model.files import write_file
from model.heinsen.config import EXTENSIONS, ModelConfig, describe
from model.heinsen.network import LanguageModel
from model.state import StateSpec
from model.text import tokenizer
from model.text.tokenizer import Tokenizer, TokenizerError

CONFIG, WEIGHTS, TOKENIZER, CHAT_TEMPLATE = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
)


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run."""

    network: LanguageModel
    tokenizer: Tokenizer
    chat_template: str | None
    fingerprint: str
    """Hash of config, weights and tokenizer: states of one fingerprint mean the same."""


def load(
    folder: Path,
    device: torch.device,
    dtype: WeightDtype = "float32",
    *,
    trainable: bool = False,
) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError.

    A network that is not to be trained is packed with weights of this dtype: faster, but it has no
    state dict any more. One that is to be trained has float32 weights.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    template = folder / CHAT_TEMPLATE
    try:
        config = read_config(folder / CONFIG)
        network = build(config, read_weights(folder / WEIGHTS), folder / WEIGHTS, device)
        words = tokenizer.read(folder / TOKENIZER)
        return Checkpoint(
            network=network.requires_grad_().train() if trainable else network.pack(dtype),
            tokenizer=check_tokenizer(words, config, folder / TOKENIZER),
            chat_template=_read_template(template) if template.exists() else None,
            fingerprint=_fingerprint(folder),
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing from the checkpoint") from error
    except (OSError, TokenizerError) as error:
        raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class Outline:
    """What decides which states are a checkpoint's."""

    config: ModelConfig
    state_spec: StateSpec
    fingerprint: str


def read_outline(folder: Path) -> Outline:
    """Read a checkpoint's outline without making its network. Raises CheckpointError."""
    try:
        config = read_config(folder / CONFIG)
        return Outline(config, _weightless(config).state_spec, _fingerprint(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing from the checkpoint") from error
    except OSError as error:
        raise CheckpointError(str(error)) from error


def save(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    words: Tokenizer,
    chat_template: str | None,
) -> None:
    """Write or replace a checkpoint. Each file is complete or not there, also after a power cut.

    Raises CheckpointError when the weights are not those of this config.
    """
    _check_weights(config, weights, folder / WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_file(folder / TOKENIZER, words.to_json().encode())
    if chat_template is None:
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        write_file(folder / CHAT_TEMPLATE, chat_template.encode())
    write_file(folder / WEIGHTS, safetensors.torch.save(tensors))
    # A paper's network has the config, and so the fingerprint, that it had before extensions.
    off = {name for name in EXTENSIONS if name not in config.extensions}
    write_file(folder / CONFIG, config.model_dump_json(indent=2, exclude=off).encode() + b"\n")


def import_state_dict(
    file: Path,
    out: Path,
    arguments: Mapping[str, object],
    tokenizer_file: Path,
    template_file: Path | None,
) -> None:
    """Make a checkpoint from a state dict of the reference implementation.

    `arguments` are those of ModelConfig. Nothing is written unless everything fits together.
    Raises CheckpointError.
    """
    try:
        config = ModelConfig.model_validate(arguments)
    except ValidationError as error:
        raise CheckpointError(describe(error)) from error
    try:
        network = build(config, read_weights(file), file, torch.device("cpu"))
        words = check_tokenizer(tokenizer.read(tokenizer_file), config, tokenizer_file)
        template = None if template_file is None else _read_template(template_file)
        save(out, config, network.state_dict(), words, template)
    except (OSError, TokenizerError) as error:
        raise CheckpointError(str(error)) from error


def read_config(path: Path) -> ModelConfig:
    """Raises CheckpointError for unknown keys, missing values and values out of range."""
    try:
        return ModelConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from error


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt`/`.pth` without running any code of it.

    Raises CheckpointError when the file is neither, OSError when it cannot be opened.
    """
    path.open("rb").close()  # not every error of the libraries would name the file
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a malformed or foreign file
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: not a file of plain tensors: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: not a state dict (a mapping of names to tensors)")
    return content


def build(
    config: ModelConfig, weights: Mapping[str, Tensor], source: Path, device: torch.device
) -> LanguageModel:
    """The network with these weights in float32; every parameter must be there, and no other."""
    network = _check_weights(config, weights, source)
    converted = {n: w.to(device, torch.float32, copy=False) for n, w in weights.items()}
    network.load_state_dict(converted, assign=True)
    return network.requires_grad_(False).eval()


def _check_weights(
    config: ModelConfig, weights: Mapping[str, Tensor], source: Path
) -> LanguageModel:
    """The network without memory for its weights, if these are its weights."""
    network = _weightless(config)
    expected = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    if missing := [name for name in expected if name not in weights]:
        raise CheckpointError(f"{source}: {_some(missing)} missing")
    if unexpected := [name for name in weights if name not in expected]:
        raise CheckpointError(f"{source}: {_some(unexpected)} not part of this network")
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{source}: {name} is {list(tensor.shape)}, the config says {list(shape)}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{source}: {name} is not all finite numbers")
    return network


def _weightless(config: ModelConfig) -> LanguageModel:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return LanguageModel(config)


def check_tokenizer(words: Tokenizer, config: ModelConfig, source: Path) -> Tokenizer:
    """The tokenizer, if the network has an embedding for each of its tokens."""
    if words.num_tokens > config.vocab_sz:
        raise CheckpointError(
            f"{source}: {words.num_tokens} tokens, but the network has vocab_sz {config.vocab_sz}"
        )
    return words


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
