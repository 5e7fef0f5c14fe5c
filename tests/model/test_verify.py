"""Every mode of evaluation reproduces every reference file, and wrong files are detected."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.verify import VerifyError, verify_file

VECTORS = Path(__file__).parents[1] / "vectors"
MODES = ["quadratic", "parallel", "chunked", "recurrent", "mixed"]
Tensors = dict[str, Tensor]
Facts = dict[str, str]


def read(name: str) -> tuple[Tensors, Facts]:
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata())


@pytest.mark.parametrize("name", ["small", "steep_keys", "uneven_heads", "wide_values"])
def test_every_mode_reproduces_the_reference(name: str) -> None:
    reports = verify_file(VECTORS / f"{name}.safetensors")
    assert [report.mode for report in reports] == MODES
    for report in reports:
        assert report.logits_error <= 2e-5, report
        assert report.state_error <= 1e-4, report
        assert report.greedy_agrees, report
        assert report.ok


def spoil_logits(tensors: Tensors) -> None:
    tensors["logits"][1, -1, 3] += 3e-5


def spoil_logits_with_nan(tensors: Tensors) -> None:
    tensors["logits"][0, -1, 0] = torch.nan


def spoil_h_s(tensors: Tensors) -> None:
    tensors["state.layers.1.H_S"][1, 0, 3, 2] *= 1.001


def spoil_h_z(tensors: Tensors) -> None:
    tensors["state.layers.0.H_Z"][0, 1, 5] *= 1.001


def spoil_position(tensors: Tensors) -> None:
    tensors["state.embed_pos"][1, 7] += 0.01


def spoil_greedy(tensors: Tensors) -> None:
    tensors["greedy_ids"][0, -1] += 1


def spoil_weights(tensors: Tensors) -> None:
    tensors["weights.lnorm.weight"] *= 1.0001


@pytest.mark.long
@pytest.mark.parametrize(
    "spoil",
    [
        spoil_logits,
        spoil_logits_with_nan,
        spoil_h_s,
        spoil_h_z,
        spoil_position,
        spoil_greedy,
        spoil_weights,
    ],
)
def test_a_small_difference_fails_every_mode(
    tmp_path: Path, spoil: Callable[[Tensors], None]
) -> None:
    tensors, facts = read("wide_values")
    spoil(tensors)
    path = tmp_path / "spoiled.safetensors"
    save_file(tensors, path, facts)
    assert [report.ok for report in verify_file(path)] == [False] * len(MODES)


def without(name: str) -> Callable[[Tensors, Facts], None]:
    def change(tensors: Tensors, facts: Facts) -> None:
        tensors.pop(name, None)
        facts.pop(name, None)

    return change


def with_tensor(name: str, value: Tensor) -> Callable[[Tensors, Facts], None]:
    def change(tensors: Tensors, _: Facts) -> None:
        tensors[name] = value

    return change


def with_fact(name: str, value: object) -> Callable[[Tensors, Facts], None]:
    def change(_: Tensors, facts: Facts) -> None:
        facts[name] = json.dumps(value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("logits"), "logits"),
        (without("greedy_ids"), "greedy_ids"),
        (without("state.layers.1.H_Z"), "H_Z"),
        (without("config"), "config"),
        (without("chunk_lengths"), "chunk_lengths"),
        (without("weights.lnorm.bias"), "lnorm.bias missing"),
        (with_tensor("logits", torch.zeros(2, 80, 127)), "logits is \\[2, 80, 127\\]"),
        (with_tensor("token_ids", torch.zeros(2, 80)), "token_ids"),
        (with_tensor("token_ids", torch.full((2, 80), 128)), "token_ids .* from 0 to 127"),
        (with_fact("config", {"vocab": 3}), "vocab"),
        (with_fact("chunk_lengths", [79, 2]), "chunk_lengths"),
        (with_fact("chunk_lengths", [81, -1]), "chunk_lengths"),
        (with_fact("chunk_lengths", 80), "int"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(
    tmp_path: Path, change: Callable[[Tensors, Facts], None], reason: str
) -> None:
    tensors, facts = read("wide_values")
    change(tensors, facts)
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, facts)
    with pytest.raises(VerifyError, match=reason) as caught:
        verify_file(path)
    assert str(caught.value).startswith(f"{path}: not a file of reference outputs")


@pytest.mark.parametrize("content", [None, b"", b"text", b"\xff" * 100])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VerifyError, match=r"x\.safetensors: not a file of reference outputs"):
        verify_file(path)
