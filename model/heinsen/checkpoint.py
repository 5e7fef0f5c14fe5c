"""A checkpoint: a folder with everything needed to serve a model.

config.json           the arguments of ModelConfig
model.safetensors     the weights, under the reference implementation's parameter names
tokenizer.json        the format of the `tokenizers` library
chat_template.jinja   messages to prompt text; optional
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from model import WeightDtype
from model.files import check_file, read_file, write_file
from model.heinsen.attention import AttentionState
from model.heinsen.config import EXTENSIONS, ModelConfig, config_errors
from model.heinsen.network import LanguageModel
from model.network import CheckpointError, Description, Loaded, checkpoint_errors
from model.state import StatePool, StateSpec
from model.text import byte_level
from model.text.tokenizer import Tokenizer, TokenizerError
from model.weights import check_finite, check_shapes, read_tensors, shorten

CONFIG, WEIGHTS, TOKENIZER, CHAT_TEMPLATE = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
)

MAX_TEXT_BYTES = 4 << 20
"""Size limit of a config or a template."""

MORE_LAYERS = 100
"""A config with more layers than this, beyond the number of tensors, is rejected early."""


name = "heinsen"


def matches(path: Path) -> bool:
    """A folder, unless its config names another model type."""
    try:
        config = json.loads(read_file(path / CONFIG, MAX_TEXT_BYTES))
    except (OSError, ValueError, RecursionError):
        return path.is_dir()
    return not isinstance(config, dict) or "model_type" not in config


def files(path: Path) -> tuple[Path, ...]:
    """Files that determine which states are compatible."""
    return path / CONFIG, path / WEIGHTS, path / TOKENIZER


@checkpoint_errors()
def describe(path: Path) -> Description:
    """Describe without reading weights. Raises CheckpointError."""
    config, source = _read_folder(path), path / WEIGHTS
    shapes, dtypes = _read_header(source)
    network = network_of_shapes(config, shapes, source)
    return Description(
        sizes=config.model_dump(),
        num_parameters=network.num_parameters,
        weight_bytes=source.stat().st_size,
        weight_dtypes=dtypes,
        vocab_size=network.vocab_size,
        state_spec=network.state_spec,
        tokenizer=_read_tokenizer(path, config),
        chat_template=_read_template(path / CHAT_TEMPLATE),
    )


@checkpoint_errors()
def load(
    path: Path, device: torch.device, dtype: WeightDtype | None = None
) -> Loaded[LanguageModel]:
    """Load a network for inference, with weights in this dtype or in the device's preferred one.

    Raises CheckpointError.
    """
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    config, source = _read_folder(path), path / WEIGHTS
    network_of_shapes(config, _read_header(source)[0], source)  # before gigabytes are read
    network = _assemble(config, read_tensors(source), source)
    words, template = _read_tokenizer(path, config), _read_template(path / CHAT_TEMPLATE)
    return Loaded(network.pack(dtype, device), words, template)


@checkpoint_errors()
def load_network(
    path: Path, device: torch.device, dtype: WeightDtype, *, plain: bool = False
) -> LanguageModel:
    """The network alone; `plain`: in plain torch. Raises CheckpointError."""
    if plain:
        config, source = _read_folder(path), path / WEIGHTS
        return build(config, read_tensors(source), source, device)
    return load(path, device, dtype).network


def published_state(pool: StatePool, row: int) -> dict[str, Tensor]:
    """`embed_pos`, and per layer `layers.N.H_S` and `layers.N.H_Z`, in the paper's form."""
    state = {"embed_pos": pool.tensors["h"][0, row]}
    for number, layer in enumerate(AttentionState.of_layers(pool)):
        h_s, h_z = layer.to_paper()
        state |= {f"layers.{number}.H_S": h_s[row], f"layers.{number}.H_Z": h_z[row]}
    return state


def initial_state(
    tensors: Mapping[str, Tensor], spec: StateSpec, source: Path
) -> Mapping[str, Tensor]:
    """Tensors of a state by their names, as an exported session has them. Raises CheckpointError
    where there is none."""
    names = {tensor.name for tensor in spec.tensors}
    if not tensors.keys() & names:
        raise CheckpointError(
            f"{source}: has none of the tensors of a state: {shorten(sorted(names))}"
        )
    return {name: tensor for name, tensor in tensors.items() if name != "recent"}


@checkpoint_errors()
def load_trainable(path: Path, device: torch.device) -> Loaded[LanguageModel]:
    """Load a network for training, with float32 weights. Raises CheckpointError."""
    config, source = _read_folder(path), path / WEIGHTS
    network_of_shapes(config, _read_header(source)[0], source)
    network = build(config, read_tensors(source), source, device)
    words, template = _read_tokenizer(path, config), _read_template(path / CHAT_TEMPLATE)
    return Loaded(network.requires_grad_().train(), words, template)


def save(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    words: Tokenizer,
    chat_template: str | None,
) -> None:
    """Write or replace a checkpoint. Each file is written atomically and durably.

    Raises CheckpointError if the weights do not fit the config.
    """
    _check(config, weights, folder / WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_file(folder / TOKENIZER, words.to_json().encode())
    if chat_template is None:
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        write_file(folder / CHAT_TEMPLATE, chat_template.encode())
    write_file(folder / WEIGHTS, safetensors.torch.save(tensors))
    # Unset extensions are omitted, so that configs of the paper's networks keep their fingerprint.
    off = {name for name in EXTENSIONS if name not in config.extensions}
    write_file(folder / CONFIG, config.model_dump_json(indent=2, exclude=off).encode() + b"\n")


def import_state_dict(
    file: Path,
    out: Path,
    arguments: Mapping[str, object],
    tokenizer_file: Path,
    template_file: Path | None,
) -> None:
    """Create a checkpoint from a state dict of the reference implementation.

    `arguments` are those of ModelConfig. Nothing is written unless everything fits together. Raises
    CheckpointError.
    """
    try:
        config = ModelConfig.model_validate(arguments)
    except ValidationError as error:
        raise CheckpointError(config_errors(error)) from error
    try:
        network = build(config, read_tensors(file), file, torch.device("cpu"))
        words = check_tokenizer(byte_level.read(tokenizer_file), config, tokenizer_file)
        template = None if template_file is None else _read_text(template_file)
        save(out, config, network.state_dict(), words, template)
    except (OSError, TokenizerError) as error:
        raise CheckpointError(str(error)) from error


def _read_folder(path: Path) -> ModelConfig:
    """The config. Raises CheckpointError, also if the folder does not exist."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    return read_config(path / CONFIG)


def read_config(path: Path) -> ModelConfig:
    """Raises CheckpointError for unknown keys, missing values and values out of range."""
    try:
        return ModelConfig.model_validate_json(read_file(path, MAX_TEXT_BYTES))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {config_errors(error)}") from error


def _read_template(path: Path) -> str | None:
    return _read_text(path) if path.exists() else None


def _read_text(path: Path) -> str:
    try:
        return read_file(path, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error


def _read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    path = folder / TOKENIZER
    return check_tokenizer(byte_level.read(path), config, path)


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by name, and dtypes, from the header of a safetensors file.

    Raises CheckpointError if it is not one, OSError if it cannot be opened.
    """
    check_file(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
            return shapes, sorted({tensor.get_dtype() for tensor in tensors.values()})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def build(
    config: ModelConfig, weights: Mapping[str, Tensor], source: Path, device: torch.device
) -> LanguageModel:
    """The network with these weights in float32; all parameters must be present, and no others."""
    return _assemble(config, weights, source).to(device, torch.float32)


def _assemble(config: ModelConfig, weights: Mapping[str, Tensor], source: Path) -> LanguageModel:
    """The network with these weights, checked but neither converted nor copied."""
    network = _check(config, weights, source)
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def _check(config: ModelConfig, weights: Mapping[str, Tensor], source: Path) -> LanguageModel:
    """The network on the meta device, if the weights fit it."""
    network = network_of_shapes(config, {name: w.shape for name, w in weights.items()}, source)
    for name, tensor in weights.items():
        check_finite(name, tensor, source)
    return network


def network_of_shapes(
    config: ModelConfig, shapes: Mapping[str, Sequence[int]], source: Path
) -> LanguageModel:
    """The network on the meta device, if weights of these shapes fit it."""
    few = config.model_copy(update={"n_layers": min(config.n_layers, len(shapes) + MORE_LAYERS)})
    try:
        with torch.device("meta"):
            network = LanguageModel(few)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{source}: the config's sizes are not possible: {reason}") from error
    expected = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    check_shapes(shapes, expected, source)
    return network


def check_tokenizer(words: Tokenizer, config: ModelConfig, source: Path) -> Tokenizer:
    """The tokenizer, if the network has an embedding for each token."""
    if words.num_tokens > config.vocab_sz:
        raise CheckpointError(
            f"{source}: {words.num_tokens} tokens, but the network has vocab_sz {config.vocab_sz}"
        )
    return words
