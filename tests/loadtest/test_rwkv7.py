"""The random checkpoints are what servers take for published ones."""

from pathlib import Path

import pytest
import torch
import typer

from loadtest.rwkv7 import rwkv7
from model import checkpoint
from model.batch import Batch


def test_a_checkpoint_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    rwkv7(folder, "tiny")
    found = checkpoint.describe(folder)
    assert (found.vocab_size, found.tokenizer is not None) == (2048, True)
    network = checkpoint.load_network(folder, torch.device("cpu"), "float32", plain=True)
    logits = network.forward(Batch.of_tokens([5, 6], [0, 1]), network.new_pool(2))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    with pytest.raises(typer.BadParameter, match="exists"):
        rwkv7(folder, "tiny")


def test_an_unknown_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"one of tiny, 0\.1B"):
        rwkv7(tmp_path / "m", "9B")
