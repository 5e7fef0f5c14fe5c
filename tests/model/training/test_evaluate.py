"""Bits per byte measure the probability of the text, however it is split and grouped."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import typer

from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import Loaded
from model.training import evaluate
from model.training.evaluate import bits_per_byte
from tests.model.calls import step

Trained = Loaded[LanguageModel]
TEXTS = ["the cat", "sat on the mät " * 9, "a", "and then the cat 🙂 sat", "the mat " * 30, "ü"]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Trained:
    return checkpoint.load_trainable(tiny_checkpoint, torch.device("cpu"))


def by_hand(loaded: Trained, texts: list[str]) -> float:
    """Token by token in float64, one text after another."""
    network = copy.deepcopy(loaded.network).double().requires_grad_(False)
    (end,) = network.config.eos_token_ids
    bits = 0.0
    for text in texts:
        pool = network.new_pool(1)
        last = network.config.bos_token_id
        assert last is not None
        for token_id in [*loaded.tokenizer.encode(text), end]:
            probabilities = step(network, torch.tensor([last]), pool, [0])[0].softmax(-1)
            bits -= math.log2(float(probabilities[token_id]))
            last = token_id
    return bits / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[3:5]])
def test_bits_per_byte_are_those_computed_by_hand(loaded: Trained, texts: list[str]) -> None:
    found = bits_per_byte(loaded.network, loaded.tokenizer, texts)
    assert found == pytest.approx(by_hand(loaded, texts), rel=1e-5)


@pytest.mark.parametrize("lanes", [1, 2, 100])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 10_000])
def test_groups_and_chunks_do_not_matter(
    loaded: Trained, monkeypatch: pytest.MonkeyPatch, lanes: int, chunk_tokens: int
) -> None:
    expected = bits_per_byte(loaded.network, loaded.tokenizer, TEXTS)
    monkeypatch.setattr(evaluate, "LANES", lanes)
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", chunk_tokens)
    found = bits_per_byte(loaded.network, loaded.tokenizer, reversed(TEXTS))
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_text_has_no_bits_per_byte(loaded: Trained) -> None:
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            bits_per_byte(loaded.network, loaded.tokenizer, texts)


def test_the_command_prints_a_line_for_each_file(
    loaded: Trained,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, TEXTS, strict=False):
        file.write_text(text, "utf-8")
    evaluate.main(tiny_checkpoint, files)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{by_hand(loaded, TEXTS[:1]):.4f} bits per byte  a.txt"
    assert second.endswith("bits per byte  b.txt")


@pytest.mark.long
def test_the_command_measures_weights_in_fewer_bits(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXTS[0], "utf-8")
    for dtype in ("float32", "int8"):
        evaluate.main(tiny_checkpoint, [file], dtype)
    exact, rounded = (float(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert exact != rounded
    assert abs(rounded / exact - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nothing", "a.txt"], "error: nothing: no such checkpoint folder"),
        (["{checkpoint}", "missing.txt"], "error: .*missing.txt"),
        (["{checkpoint}", "{empty}"], "error: there is no text"),
    ],
)
def test_the_command_refuses_with_a_reason(
    tiny_checkpoint: Path,
    tmp_path: Path,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").touch()
    names = {"{checkpoint}": str(tiny_checkpoint), "{empty}": str(tmp_path / "empty.txt")}
    folder, *files = (Path(names.get(argument, argument)) for argument in arguments)
    with pytest.raises(typer.Exit):
        evaluate.main(folder, files)
    assert re.match(reason, capsys.readouterr().err)
