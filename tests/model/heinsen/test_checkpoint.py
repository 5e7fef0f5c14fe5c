"""A checkpoint is written atomically, read back unchanged, and otherwise rejected with a reason."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import WeightDtype
from model.checkpoint import CheckpointError, fingerprint
from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.weights import read_tensors

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def arguments_of(folder: Path) -> dict[str, Any]:
    return checkpoint.read_config(folder / "config.json").model_dump()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, CPU)
    return str(caught.value)


@pytest.mark.parametrize("template", [None, "{{ messages }}\n"])
@pytest.mark.parametrize(
    "options",
    [{"values": "log"}, {"values": "linear"}, {"decay": True, "token_shift": True}],
    ids=str,
)
def test_what_is_saved_is_loaded(
    options: dict[str, Any], template: str | None, tmp_path: Path
) -> None:
    words = byte_level.train(["a b c"], 280, ["<|endoftext|>"])
    config = ModelConfig(
        vocab_sz=290, d_emb=8, n_layers=2, n_heads=2, d_key=4, d_val=3, eos_token_ids=(0, 3),
        **options,
    )  # fmt: skip
    network = LanguageModel(config)
    checkpoint.save(tmp_path / "a" / "b", config, network.state_dict(), words, template)
    loaded = checkpoint.load_trainable(tmp_path / "a" / "b", CPU)
    assert loaded.network.config == config
    assert loaded.chat_template == template
    assert loaded.tokenizer.to_json() == words.to_json()
    found = loaded.network.state_dict()
    assert list(found) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(found[name], tensor)


def test_a_config_names_only_the_extensions_that_are_on(folder: Path, tmp_path: Path) -> None:
    """A network of the paper thus keeps its fingerprint, and older versions can read it."""
    loaded = checkpoint.load_trainable(folder, CPU)
    paper, words = loaded.network.config, loaded.tokenizer
    names = {"decay", "token_shift", "output_gate"}
    for config, on in ((paper, set()), (paper.model_copy(update={"decay": True}), {"decay"})):
        weights = LanguageModel(config).state_dict()
        checkpoint.save(tmp_path / "out", config, weights, words, None)
        assert names & set(json.loads((tmp_path / "out" / "config.json").read_bytes())) == on


def test_only_a_network_to_be_trained_has_gradients(folder: Path) -> None:
    trained = checkpoint.load_trainable(folder, CPU).network
    served = checkpoint.load(folder, CPU).network
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())
    assert not served.training
    assert not any(p.requires_grad for p in served.parameters())
    assert served.num_parameters == trained.num_parameters
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        expected, _ = trained.unroll(ids, trained.empty_state(2))
        found, _ = served.unroll(ids, served.empty_state(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_checkpoint_is_replaced_with_its_template(folder: Path) -> None:
    loaded = checkpoint.load_trainable(folder, CPU)
    config, weights = loaded.network.config, loaded.network.state_dict()
    for template in ("x", None):
        checkpoint.save(folder, config, weights, loaded.tokenizer, template)
        assert checkpoint.load(folder, CPU).chat_template == template


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_float_type_become_float32(folder: Path, dtype: torch.dtype) -> None:
    weights = {n: w.to(dtype) for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    for name, tensor in checkpoint.load_trainable(folder, CPU).network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def drop(weights: Weights) -> None:
    del weights["layers.1.feedforward1.1.bias"]


def add(weights: Weights) -> None:
    weights["layers.2.extra"] = torch.zeros(1)


def turn(weights: Weights) -> None:
    weights["layers.0.feedforward2.2.weight"] = torch.zeros(32, 31)


def put(value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights["lnorm.bias"][3] = value

    return change


def enlarge(weights: Weights) -> None:
    weights["lnorm.bias"] = torch.full((32,), 1e300, dtype=torch.float64)


def count(weights: Weights) -> None:
    weights["lnorm.weight"] = torch.ones(32, dtype=torch.int64)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop, "layers.1.feedforward1.1.bias missing"),
        (dict.clear, " and 16 more missing"),
        (add, "layers.2.extra not part of this network"),
        (turn, "layers.0.feedforward2.2.weight is [32, 31], not [32, 32] as in this network"),
        (put(float("nan")), "lnorm.bias has values that are not finite"),
        (put(float("-inf")), "lnorm.bias has values that are not finite"),
        (enlarge, "lnorm.bias has values that are not finite"),
        (count, "lnorm.weight has values that are not finite"),
    ],
)
def test_wrong_weights_are_refused_by_name(
    folder: Path, damage: Callable[[Weights], None], reason: str
) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path)
    message = refusal(folder)
    assert message.startswith(f"{path}: ")
    assert message.endswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_layer": 2}, "n_layer: Extra inputs are not permitted"),
        ({"d_emb": "32"}, "d_emb: Input should be a valid integer"),
        ({"bos_token_id": 300}, "token id 300 is not below vocab_sz 300"),
        ({"n_layers": 3}, "layers.2.feedforward1.0.weight, "),
        ({"vocab_sz": 10, "bos_token_id": None, "eos_token_ids": []}, "embed.weight is [300, 32]"),
    ],
)
def test_a_wrong_config_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in refusal(folder)


def test_files_that_are_something_else_are_refused(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = folder / name
        content = path.read_bytes()
        for wrong in (content[: len(content) // 2], b"", b"\xff\xfe\x00 not this", b"[]"):
            path.write_bytes(wrong)
            assert refusal(folder).startswith(f"{path}: ")
            with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")):
                checkpoint.describe(folder)
        path.unlink()
        assert refusal(folder) == f"{path}: missing from the checkpoint"
        with pytest.raises(CheckpointError, match="missing from the checkpoint"):
            checkpoint.describe(folder)
        path.write_bytes(content)
    checkpoint.load(folder, CPU)


def test_a_chat_template_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    assert "chat_template.jinja: not UTF-8 text" in refusal(folder)


def test_a_tokenizer_larger_than_the_network_is_refused(folder: Path) -> None:
    words = byte_level.train([f"{i}word{i * i}" for i in range(99)], 310, ["<|endoftext|>"])
    assert words.num_tokens == 310
    (folder / "tokenizer.json").write_text(words.to_json())
    assert refusal(folder).endswith("tokenizer.json: 310 tokens, but the network has vocab_sz 300")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_the_description_is_that_of_the_network(folder: Path, dtype: WeightDtype) -> None:
    loaded, found = checkpoint.load(folder, CPU, dtype), checkpoint.describe(folder)
    assert found.state_spec == loaded.network.state_spec
    assert found.sizes == loaded.network.config.model_dump()
    assert found.num_parameters == loaded.network.num_parameters
    assert found.vocab_size == loaded.network.vocab_size
    assert found.tokenizer is not None
    assert found.tokenizer.to_json() == loaded.tokenizer.to_json()
    assert found.chat_template is loaded.chat_template is None
    assert found.weight_dtypes == ["F32"]


def test_no_weight_is_read_for_a_description(folder: Path) -> None:
    path = folder / "model.safetensors"
    expected = checkpoint.describe(folder)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)  # not a number
    path.write_bytes(content)
    assert "not finite" in refusal(folder)
    assert replace(checkpoint.describe(folder), tokenizer=expected.tokenizer) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"d_emb": 2**62},
        {"n_heads": 10**30},
        {"vocab_sz": 2**62, "d_key": 2**62},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused_at_once(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refusal(folder).startswith(f"{folder}/")
    with pytest.raises(CheckpointError):
        checkpoint.describe(folder)


class Bomb:
    """Writes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, suffix: str) -> None:
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    torch.save({"embed.weight": torch.ones(2), "more": Bomb(trace)}, path)
    with pytest.raises(CheckpointError, match="not a file of plain tensors") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"a": 1}, {"a": {"b": torch.ones(1)}}, {0: torch.ones(1)}, None]
)
def test_a_pickle_of_something_else_than_a_state_dict_is_refused(
    tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_tensors(tmp_path / "x.pt")


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_reference_state_dict_is_imported(folder: Path, tmp_path: Path, suffix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    file = tmp_path / f"reference{suffix}"
    if suffix == ".pt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    template = tmp_path / "template"
    template.write_text("{{ bos }}")
    words = folder / "tokenizer.json"
    checkpoint.import_state_dict(file, tmp_path / "out", arguments_of(folder), words, template)
    imported, original = (checkpoint.load(path, CPU) for path in (tmp_path / "out", folder))
    assert fingerprint(tmp_path / "out") == fingerprint(folder)
    for name, tensor in original.network.state_dict().items():
        assert torch.equal(imported.network.state_dict()[name], tensor)
    assert imported.chat_template == "{{ bos }}"


@pytest.mark.parametrize("wrong", ["weights", "no weights", "tokenizer", "template", "no template"])
def test_nothing_is_imported_when_anything_is_wrong(
    folder: Path, tmp_path: Path, wrong: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    if wrong == "weights":
        del weights["lnorm.bias"]
    file, words, template = tmp_path / "x.pt", folder / "tokenizer.json", tmp_path / "template"
    template.write_text("{{ bos }}")
    torch.save(weights, file)
    match wrong:
        case "tokenizer":
            words.write_text("{}")
        case "template":
            template.write_bytes(b"\xff")
        case "no template":
            template.unlink()
        case "no weights":
            file.unlink()
    named = {"weights": file, "no weights": file, "tokenizer": words}.get(wrong, template)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.import_state_dict(file, tmp_path / "out", arguments_of(folder), words, template)
    assert str(named) in str(caught.value)
    assert not (tmp_path / "out").exists()
