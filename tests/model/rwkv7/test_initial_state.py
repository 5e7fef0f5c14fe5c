"""A tuned initial state is the state that sequences start from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.batch import Batch
from model.checkpoint import CheckpointError
from model.rwkv7.checkpoint import load_network
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import CPU, SMALL, Definition, Weights

CONFIG = replace(SMALL, vocab_size=300, num_layers=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return networks.save_pth(tmp_path / "model.pth", networks.weights(CONFIG))


def tuned(dtype: torch.dtype = torch.float32) -> Weights:
    chance = torch.Generator().manual_seed(4)
    return {
        f"blocks.{layer}.att.time_state": torch.randn(2, 64, 64, generator=chance).to(dtype)
        for layer in range(2)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_continues_from_it(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Its rows are value channels, as in the definition's state."""
    states, file = tuned(dtype), tmp_path / "tuned.pth"
    torch.save(states, file)
    network = load_network(model, CPU, plain=True)
    pool = network.new_pool(3)
    pool.import_row(1, checkpoint.read_initial_state(model, file, CONFIG.state_spec))
    definition = Definition(CONFIG, networks.weights(CONFIG))
    for layer, state in enumerate(states.values()):
        definition.wkv[layer] = state.double().numpy()
    for token_id in (7, 299, 8):
        expected = torch.from_numpy(definition.read(token_id))
        [logits] = network.forward(Batch.of_tokens(np.array([token_id]), [1]), pool)
        assert float((logits - expected).abs().max()) <= 1e-4


def drop(states: Weights) -> None:
    del states["blocks.1.att.time_state"]


def grow(states: Weights) -> None:
    states["blocks.2.att.time_state"] = torch.zeros(2, 64, 64)


def narrow(states: Weights) -> None:
    states["blocks.1.att.time_state"] = torch.zeros(4, 32, 32)


def spoil(states: Weights) -> None:
    states["blocks.1.att.time_state"][0, 1, 2] = torch.nan


def whole(states: Weights) -> None:
    states["blocks.0.att.time_state"] = torch.zeros(2, 64, 64, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, "blocks.1.att.time_state missing"),
        (grow, "blocks.2.att.time_state not part of this network"),
        (narrow, r"blocks.1.att.time_state is \[4, 32, 32\], not \[2, 64, 64\]"),
        (spoil, "blocks.1.att.time_state has values that are not finite"),
        (whole, "time_state has values that are not finite"),
        (dict.clear, "not a tuned initial state"),
    ],
)
def test_one_of_another_network_is_refused(
    model: Path, tmp_path: Path, change: Callable[[Weights], None], reason: str
) -> None:
    states, file = tuned(), tmp_path / "tuned.pth"
    change(states)
    torch.save(states, file)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.read_initial_state(model, file, CONFIG.state_spec)
    assert str(caught.value).startswith(str(file))


def test_other_files_are_refused(model: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "none.pth", model):
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.read_initial_state(model, file, CONFIG.state_spec)
