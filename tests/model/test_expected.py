"""A published checkpoint is compared with expected outputs, and small differences are found."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.expected import compare
from model.verify import VerifyError
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import SMALL, Definition, Weights
from tests.server.cli.commands import latentd, refused, stdout_of

CONFIG = replace(SMALL, vocab_size=300, d_emb=64, num_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.pth`, and the definition's results in `expected.safetensors`."""
    folder, made = tmp_path_factory.mktemp("published"), networks.weights(CONFIG)
    networks.save_pth(folder / "model.pth", made)
    definition = Definition(CONFIG, made)
    ids = np.random.default_rng(0).integers(0, 300, 40)
    outputs = [definition.read(int(token_id)) for token_id in ids]
    state = {
        name: torch.from_numpy(getattr(definition, name)).float().contiguous()
        for name in ("att_shift", "ffn_shift", "wkv")
    }
    greedy, logits = [], outputs[-1]
    for _ in range(8):
        greedy.append(int(logits.argmax()))
        logits = definition.read(greedy[-1])
    tensors = {
        "ids": torch.from_numpy(ids),
        "logits": torch.from_numpy(np.stack(outputs)).float(),
        "greedy": torch.tensor(greedy),
    }
    save_file(tensors | state, folder / "expected.safetensors")
    return folder


def spoiled(folder: Path, tmp_path: Path, change: Callable[[Weights], object]) -> Path:
    tensors = load_file(folder / "expected.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "spoiled.st")
    return tmp_path / "spoiled.st"


def test_every_reading_mode_agrees(folder: Path) -> None:
    found = list(compare(folder / "expected.safetensors", folder / "model.pth"))
    pieces = ["token by token", "in one piece", "in random pieces"]
    assert [each.pieces for each in found] == 2 * pieces
    assert [each.backend for each in found] == ["compiled"] * 3 + ["plain torch"] * 3
    assert all(each.ok for each in found)


def add(name: str, place: tuple[int, ...], amount: float) -> Callable[[Weights], None]:
    def change(tensors: Weights) -> None:
        tensors[name][place] += amount

    return change


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (add("logits", (17, 230), 0.01), r"logit of id 230 after token 17 is \S+, expected"),
        (add("logits", (39, 0), torch.nan), "logit of id 0 after token 39"),
        (add("wkv", (1, 0, 3, 60), 0.01), r"wkv\[1, 0, 3, 60\] is"),
        (lambda tensors: tensors.update(wkv=tensors["wkv"].mT), r"wkv\["),
        (add("att_shift", (2, 5), -0.01), r"att_shift\[2, 5\] is"),
        (add("ffn_shift", (0, 63), 0.01), r"ffn_shift\[0, 63\] is"),
        (
            lambda tensors: tensors["greedy"].__setitem__(6, (tensors["greedy"][6] + 1) % 300),
            r"greedy token 6 is \d+, expected \d+",
        ),
    ],
)
def test_a_small_difference_fails_and_is_located(
    folder: Path, tmp_path: Path, change: Callable[[Weights], object], where: str
) -> None:
    for found in compare(spoiled(folder, tmp_path, change), folder / "model.pth"):
        [fault] = found.faults
        assert re.match(where, fault)
        assert not found.ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("greedy"), "it has no greedy"),
        (lambda tensors: tensors.pop("wkv"), "it has no wkv"),
        (lambda tensors: tensors.update(h=torch.zeros(1)), "h does not exist in"),
        (lambda tensors: tensors.update(ids=tensors["ids"] + 280), "ids must be from 0 to 299"),
        (
            lambda tensors: tensors.update(ids=tensors["ids"][None]),
            "ids must be a non-empty vector",
        ),
        (lambda tensors: tensors.update(logits=tensors["logits"][:, 1:]), r"logits is \[40, 299\]"),
    ],
)
def test_a_file_of_something_else_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Weights], object], reason: str
) -> None:
    file = spoiled(folder, tmp_path, change)
    with pytest.raises(VerifyError, match=reason) as caught:
        list(compare(file, folder / "model.pth"))
    assert str(caught.value).startswith(f"{file}: not a file of expected outputs")


def test_the_command_says_where_and_exits_with_1(folder: Path, tmp_path: Path) -> None:
    model = folder / "model.pth"
    stdout_of("verify", folder / "expected.safetensors", "--checkpoint", model)
    file = spoiled(folder, tmp_path, add("logits", (17, 230), 0.01))
    done = latentd("verify", file, "--checkpoint", model)
    assert done.exit_code == 1
    assert "compiled, in one piece: logit of id 230 after token 17 is" in done.stdout
    assert "not a file of expected outputs" in refused("verify", model, "--checkpoint", model)
