"""Which files are accepted, as what, and why others are rejected."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import WeightDtype, checkpoint
from model.batch import Batch
from model.checkpoint import CheckpointError
from model.rwkv7 import checkpoint as rwkv7
from model.rwkv7.files import open_source
from model.text import g1
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import CPU, SMALL, Weights

TINY = replace(SMALL, vocab_size=300, d_emb=64, num_heads=1, num_layers=2)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    return networks.save_pth(tmp_path / "model.pth", networks.weights(TINY))


def logits(path: Path) -> torch.Tensor:
    network = rwkv7.load_network(path, CPU, "float32")
    batch = Batch.of([[5, 299, 7]], [0]).wanting([0, 1, 2])
    return network.forward(batch, network.new_pool(1))


def test_every_format_is_the_same_network(pth: Path, tmp_path: Path) -> None:
    made, expected = networks.weights(TINY), logits(pth)
    one = networks.save_hf(tmp_path / "one", TINY, made)
    several = networks.save_hf(tmp_path / "several", TINY, made, num_shards=3)
    for path in (one, several):
        assert torch.equal(logits(path), expected)
    assert open_source(pth).config == TINY
    assert open_source(several).config == replace(TINY, eos=(2,))
    assert [file.suffix for file in open_source(several).files[:2]] == [".json", ".json"]


def test_what_only_the_config_says_counts(tmp_path: Path) -> None:
    made = networks.weights(TINY)
    folder = networks.save_hf(
        tmp_path / "model", TINY, made, norm_eps=1e-3, eos_token_id=[3, 4], bos_token_id=9
    )
    config = open_source(folder).config
    assert (config.norm_eps, config.eos, config.bos) == (1e-3, (3, 4), None)
    assert config.group_norm_eps == pytest.approx(64e-3)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    made = networks.weights(TINY)
    made["head.weight"] = made["emb.weight"]
    whole = networks.save_pth(tmp_path / "model.pth", made)
    del made["head.weight"]
    tied = networks.save_hf(tmp_path / "tied", TINY, made, tie_word_embeddings=True)
    assert torch.equal(logits(tied), logits(whole))


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "bfloat16"),
    ],
    ids=str,
)
def test_weights_are_served_in_the_dtype_of_the_file(
    tmp_path: Path, stored: torch.dtype, served: WeightDtype
) -> None:
    path = networks.save_pth(tmp_path / "model.pth", networks.weights(TINY, stored))
    network = rwkv7.load_network(path, CPU, plain=True)
    assert network.weights.head.weight.dtype == getattr(torch, served)
    assert network.weights.embed.dtype == getattr(torch, served)
    mix = network.weights.layers[1].time_mix
    assert {mix.decay.up.weight.dtype, mix.decay.down.weight.dtype} == {torch.float32}
    asked = rwkv7.load_network(path, CPU, "int8", plain=True)
    assert asked.weights.head.weight.dtype == torch.int8
    assert asked.weights.embed.dtype == torch.bfloat16
    assert asked.num_parameters == network.num_parameters
    assert asked.weight_bytes < network.weight_bytes


def test_a_model_is_described_without_a_tokenizer_but_not_served(pth: Path) -> None:
    (pth.parent / "rwkv_vocab_none.txt").write_text("")
    found = checkpoint.describe(pth)
    assert (found.tokenizer, found.vocab_size, found.weight_dtypes) == (None, 300, ["F32"])
    assert found.num_parameters == rwkv7.load_network(pth, CPU).num_parameters
    assert found.state_spec.num_bytes == 4 * (64 + 2 * 2 * 64 + 2 * 64 * 64)
    assert found.weight_bytes == pth.stat().st_size
    assert found.chat_template == g1.TEMPLATE
    (pth.parent / "chat_template.jinja").write_text("another")
    assert checkpoint.describe(pth).chat_template == "another"
    with pytest.raises(CheckpointError, match="rwkv_vocab_none"):
        checkpoint.load(pth, CPU)


def changed(change: Callable[[Weights], object]) -> Callable[[Path], Path]:
    """Saves modified official weights."""

    def save(folder: Path) -> Path:
        made = networks.official(networks.weights(TINY))
        change(made)
        torch.save(made, folder / "model.pth")
        return folder / "model.pth"

    return save


def expanded(folder: Path) -> Path:
    """A vocabulary of any size, of one number in the file."""
    made = networks.official(networks.weights(TINY))
    made |= dict.fromkeys(("emb.weight", "head.weight"), torch.zeros(1).expand(2**40, 64))
    torch.save(made, folder / "model.pth")
    return folder / "model.pth"


def with_views(folder: Path) -> Path:
    """Many layers, of one layer's numbers."""
    made = networks.official(networks.weights(TINY))
    layer = {name: each for name, each in made.items() if name.startswith("blocks.1.")}
    for number in range(2, 300):
        made |= {name.replace(".1.", f".{number}.", 1): each for name, each in layer.items()}
    torch.save(made, folder / "model.pth")
    return folder / "model.pth"


def with_name(name: str) -> Callable[[Path], Path]:
    return changed(lambda made: made.update({name: torch.zeros(2, 2)}))


def of_version(*parts: str) -> Callable[[Path], Path]:
    """Official weights of an older version, recognisable by its names."""

    def save(folder: Path) -> Path:
        names = ["emb.weight", *(f"blocks.0.att.{part}" for part in parts), "head.weight"]
        torch.save({name: torch.zeros(4, 4) for name in names}, folder / "model.pth")
        return folder / "model.pth"

    return save


def folder_with(**reported: object) -> Callable[[Path], Path]:
    made = networks.weights(TINY)
    return lambda folder: networks.save_hf(folder / "model", TINY, made, 1, **reported)


def gguf(folder: Path) -> Path:
    path = folder / "model.bin"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def text(folder: Path) -> Path:
    path = folder / "model.pth"
    path.write_text("no weights")
    return path


def damaged_index(folder: Path) -> Path:
    path = networks.save_hf(folder / "model", TINY, networks.weights(TINY), num_shards=2)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    return path


def without_shard(folder: Path) -> Path:
    path = networks.save_hf(folder / "model", TINY, networks.weights(TINY), num_shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_version("time_decay", "time_mix_k"), "RWKV-4, with another recurrence"),
        (of_version("time_decay", "ln_x.weight", "time_mix_k"), "RWKV-5, with another recurrence"),
        (of_version("time_decay", "ln_x.weight", "time_maa_x"), "RWKV-6, with another recurrence"),
        (with_name("blocks.0.ffn.s_emb.weight"), "RWKV-7a, .* embedding of each token"),
        (with_name("blocks.0.qkv.qq.weight"), "RWKV-7b, .* cache of all tokens"),
        (with_name("blocks.0.ffn.enn.weight"), "RWKV-8, .* embedding of each token"),
        (with_name("blocks.0.rosa.emb.weight"), "RWKV-8, .* followed the same tokens"),
        (of_version("time_state"), "a tuned initial state"),
        (with_name("_strategy"), "converted for a strategy"),
        (folder_with(model_type="rwkv"), "RWKV-4, with another recurrence"),
        (folder_with(model_type="rwkv5"), "RWKV-5, with another recurrence"),
        (folder_with(model_type="rwkv6"), "RWKV-6, with another recurrence"),
        (folder_with(model_type="rwkv9"), "model_type 'rwkv9', which is unknown"),
        (folder_with(quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\)"),
        (folder_with(attn={"layers": [1]}), "attn is .* only null is served"),
        (folder_with(hidden_size=65), "hidden_size is 65, but the weights are for 64"),
        (folder_with(norm_eps="small"), "norm_eps is 'small'"),
        (folder_with(eos_token_id=300), "eos_token_id 300 is not below 300"),
        (
            changed(lambda made: made.update({"head.weight": torch.zeros(300, 64).char()})),
            "head.weight is int8: quantised weights are not supported",
        ),
        (gguf, "GGUF"),
        (text, "not a file of plain tensors"),
        (damaged_index, "'../other.safetensors' is not the name of a file"),
        (without_shard, "model-00002-of-00002.safetensors: missing"),
        (changed(lambda made: made.pop("ln_out.bias")), "ln_out.bias missing"),
        (changed(lambda made: made.pop("blocks.0.att.r_k")), "it has no blocks.0.att.r_k"),
        (expanded, "its tensors would take .* more than twice those of the file"),
        (with_views, "its tensors would take .* more than twice those of the file"),
        (
            changed(lambda made: made.update({"head.weight": torch.zeros(300, 64).to_sparse()})),
            "head.weight is no plain tensor",
        ),
        (with_name("blocks.0.att.more"), "blocks.0.att.more not part of this network"),
        (with_name("blocks.99999999999.ln1.weight"), "100000000000 layers, but"),
        (
            changed(lambda made: made.update({"blocks.1.att.w1": torch.zeros(64, 9)})),
            r"blocks.1.att.w1 is \[9, 64\], not \[8, 64\]",
        ),
        (
            changed(lambda made: made["blocks.1.att.g2"].fill_(torch.inf)),
            "blocks.1.att.g2 has values that are not finite",
        ),
    ],
)
def test_other_files_are_refused_with_the_reason_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    assert checkpoint.is_checkpoint(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.load_network(path, CPU, "float32")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_nothing_that_a_file_says_is_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"emb.weight": Path("x")}, path)
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        rwkv7.load_network(path, CPU)
