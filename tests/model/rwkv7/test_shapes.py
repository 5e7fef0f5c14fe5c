"""Checkpoints of any shape and format: the network of its definition, or refused in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model import checkpoint
from model.batch import Batch
from model.checkpoint import CheckpointError
from model.rwkv7 import names
from model.rwkv7.checkpoint import published_state
from model.rwkv7.config import Config
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import CPU, SMALL, Definition, Weights

NUM_TOKENS = 70
"""More than a chunk."""

DTYPES = torch.float32, torch.bfloat16, torch.float16
RANKS = st.integers(1, 40)


@st.composite
def configs(draw: st.DrawFn, head_sizes: tuple[int, ...] = (64,)) -> Config:
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from(head_sizes))
    layers = draw(st.integers(1, 4))
    return Config(
        vocab_size=draw(st.integers(3, 150)),
        d_emb=heads * size,
        num_layers=layers,
        num_heads=heads,
        head_size=size,
        d_ffn=draw(st.integers(1, 150)),
        decay_rank=draw(RANKS),
        rate_rank=draw(RANKS),
        value_rank=draw(RANKS) if layers > 1 else 0,
        gate_rank=draw(RANKS),
    )


def save(folder: Path, config: Config, made: Weights, kind: str) -> Path:
    if kind == "folder":
        return networks.save_hf(folder / "hf", config, made)
    if kind == "shards":
        return networks.save_hf(folder / "hf", config, made, num_shards=3)
    if kind == "bare":  # without what no network uses in its first layer
        tensors = networks.official(made)
        for letter in "012":
            del tensors[f"blocks.0.att.v{letter}"]
        torch.save(tensors, folder / "m.pth")
        return folder / "m.pth"
    return networks.save_pth(folder / "m.pth", made)


def verify(config: Config, dtype: torch.dtype, kind: str, *, plain: bool) -> None:
    made = networks.weights(config, dtype)
    definition = Definition(replace(config, group_norm_eps=epsilon(config, kind)), made)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, NUM_TOKENS)
    expected = torch.from_numpy(np.stack([definition.read(int(i)) for i in ids]))
    with TemporaryDirectory() as folder:
        path = save(Path(folder), config, made, kind)
        network = checkpoint.load_network(path, CPU, "float32", plain=plain)
        assert network.is_compiled is not plain
        pool = network.new_pool(2)
        found = network.forward(Batch.of([ids], [1]).wanting(np.arange(NUM_TOKENS)), pool)
    assert float((found - expected).abs().max()) <= 1e-4
    for name, values in published_state(pool, 1).items():
        theirs = torch.from_numpy(getattr(definition, name))
        torch.testing.assert_close(values.double(), theirs, rtol=1e-4, atol=1e-4)


def epsilon(config: Config, kind: str) -> float:
    """Of the group norm: the official one, or flash-linear-attention's."""
    return config.head_size * 1e-5 if kind in ("folder", "shards") else 64e-5


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    configs(head_sizes=(64, 64, 16, 32, 48, 128)),
    st.sampled_from(DTYPES),
    st.sampled_from(["pth", "bare", "folder", "shards"]),
)
def test_any_shape_is_the_definition_in_plain_torch(
    config: Config, dtype: torch.dtype, kind: str
) -> None:
    verify(config, dtype, kind, plain=True)


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(configs(), st.sampled_from(DTYPES), st.sampled_from(["pth", "bare", "folder", "shards"]))
def test_any_shape_is_the_definition_compiled(
    config: Config, dtype: torch.dtype, kind: str
) -> None:
    verify(config, dtype, kind, plain=False)


NAMES = sorted(networks.official(networks.weights(replace(SMALL, d_emb=64, num_heads=1))))


HOW = (
    *("missing", "larger", "turned", "empty", "scalar"),
    *("NaN", "whole", "double", "sparse", "renamed"),
)


def spoil(tensors: Weights, name: str, how: str) -> None:
    tensor = tensors[name]
    match how:
        case "missing":
            del tensors[name]
        case "larger":
            tensors[name] = torch.cat([tensor, tensor], -1)
        case "turned":
            tensors[name] = tensor.reshape(*tensor.shape, 1, 1)
        case "empty":
            tensors[name] = tensor[..., :0]
        case "scalar":
            tensors[name] = torch.tensor(1.0)
        case "NaN":
            tensor.view(-1)[-1] = torch.nan
        case "whole":
            tensors[name] = tensor.to(torch.int32)
        case "double":
            tensors[name] = tensor.double()
        case "sparse":
            tensors[name] = tensor.to_sparse()
        case "renamed":
            tensors[f"{name}.more"] = tensors.pop(name)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([name for name in NAMES if not name.startswith("blocks.0.att.v")]),
    st.sampled_from(HOW),
)
def test_a_tensor_that_is_not_as_it_should_be_is_refused_in_a_line(name: str, how: str) -> None:
    assume(how != "turned" or not names.VECTOR.fullmatch(name))  # which come in several shapes
    config = replace(SMALL, vocab_size=99, d_emb=64, num_heads=1)
    tensors = networks.official(networks.weights(config))
    spoil(tensors, name, how)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_network(path, CPU, "float32", plain=True)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400


TINY = replace(SMALL, vocab_size=99, d_emb=64, num_heads=1, num_layers=2)
INDEX = "model.safetensors.index.json"


def index_with(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return write


def set_config(**values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return write


def twice(folder: Path) -> None:
    first = folder / "model-00001-of-00003.safetensors"
    (folder / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())


def cut(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


LAST = "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (index_with(lambda m: m.update(dict.fromkeys(m, "none.safetensors"))), "none.safetensors"),
        (index_with(lambda m: m.update({n: "x" for n in m if m[n] == LAST})), "x: missing"),
        (index_with(lambda m: [m.pop(n) for n in [*m] if m[n] == LAST]), "it has no|missing"),
        (index_with(dict.clear), "it has no"),
        (lambda folder: (folder / INDEX).write_text("{"), "not JSON"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 3}}'), "no weight_map"),
        (twice, "is in more than one file"),
        (cut, "not a safetensors file"),
        (set_config(num_hidden_layers=3), "num_hidden_layers is 3"),
        (set_config(v_low_rank_dim=99), "v_low_rank_dim is 99, but the weights are for 16"),
        (set_config(head_dim=32), "head_dim is 32"),
        (set_config(head_dim=None, num_heads=4), "num_heads is 4"),
        (set_config(vocab_size=100), "vocab_size is 100"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    folder = networks.save_hf(tmp_path / "model", TINY, networks.weights(TINY), num_shards=3)
    change(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.load_network(folder, CPU, "float32", plain=True)
    assert "\n" not in str(caught.value)


def test_where_an_index_says_a_tensor_is_does_not_matter(tmp_path: Path) -> None:
    made = networks.weights(TINY)
    folder = networks.save_hf(tmp_path / "model", TINY, made, num_shards=3)
    index_with(lambda m: m.update({next(iter(m)): LAST}))(folder)
    whole = networks.save_pth(tmp_path / "model.pth", made)
    batch = Batch.of([[5, 7, 3]], [0]).wanting([0, 1, 2])
    logits = []
    for path in (folder, whole):
        network = checkpoint.load_network(path, CPU, "float32", plain=True)
        logits.append(network.forward(batch, network.new_pool(1)))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


def test_a_head_beside_a_tied_one_is_the_embedding(tmp_path: Path) -> None:
    """As Hugging Face's libraries have it, whatever the file says."""
    made = networks.weights(TINY)
    tied = networks.save_hf(tmp_path / "tied", TINY, made, tie_word_embeddings=True)
    network = checkpoint.load_network(tied, CPU, "float32", plain=True)
    made["head.weight"] = made["emb.weight"]
    whole = checkpoint.load_network(
        networks.save_pth(tmp_path / "m.pth", made), CPU, "float32", plain=True
    )
    batch = Batch.of([[5, 7]], [0])
    found, expected = (each.forward(batch, each.new_pool(1)) for each in (network, whole))
    assert torch.equal(found, expected)


def test_a_legacy_file_is_refused_with_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    tensors = networks.official(networks.weights(TINY))
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"legacy format, .* save it again with torch.save"):
        checkpoint.load_network(path, CPU, "float32")
    torch.save(torch.load(path), path)
    assert checkpoint.load_network(path, CPU, "float32", plain=True).vocab_size == 99


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(99), b"PK\x03\x04" + bytes(99), b"\0\1"])
def test_what_only_has_the_name_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"GGUF|not a file of plain tensors") as caught:
        checkpoint.load_network(path, CPU, "float32")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
