"""The network, plain and compiled, against its definition in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model import WeightDtype
from model.batch import Batch
from model.kernels.cpu import arithmetic
from model.rwkv7.checkpoint import build, published_state
from model.rwkv7.config import Config
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import CPU, SMALL, Definition

IDS = np.random.default_rng(2).integers(0, 63, 150)
CONFIGS = {
    "small": SMALL,
    "of one layer": replace(SMALL, num_layers=1, value_rank=0),
    "of another head size": replace(SMALL, d_emb=96, num_heads=3, head_size=32, vocab_size=131),
    "with other epsilons": replace(SMALL, vocab_size=64, norm_eps=1e-3, group_norm_eps=1e-2),
}


def compare(config: Config, plain: bool) -> None:
    made = networks.weights(config)
    definition = Definition(config, made)
    expected = torch.from_numpy(np.stack([definition.read(int(i)) for i in IDS]))
    network = build(networks.source(config, made), CPU, "float32", plain=plain)
    assert network.is_compiled is not plain
    for cuts in ([], [1, 64, 66, 149]):
        pool = network.new_pool(2)
        parts = [
            network.forward(Batch.of([part], [1]).wanting(np.arange(len(part))), pool)
            for part in np.split(IDS, cuts)
        ]
        assert float((torch.cat(parts) - expected).abs().max()) <= 1e-4
        torch.testing.assert_close(network.logits(pool, [1]), parts[-1][-1:], rtol=0, atol=2e-5)
        for name, found in published_state(pool, 1).items():
            theirs = torch.from_numpy(getattr(definition, name))
            torch.testing.assert_close(found.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_torch_is_the_definition(name: str) -> None:
    compare(CONFIGS[name], plain=True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if CONFIGS[name].head_size != 64 else [])
        for name in CONFIGS
    ],
)
def test_the_compiled_step_is_the_definition(name: str) -> None:
    compare(CONFIGS[name], plain=False)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_compute_the_same_compiled_and_in_plain_torch(
    dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "features", list)
    batch = Batch.of([IDS[:90], IDS[90:]], [1, 0]).wanting(np.arange(len(IDS)))
    found = []
    for plain in (True, False):
        network = networks.network(dtype=dtype, plain=plain)
        found.append(network.forward(batch, network.new_pool(2)))
    exact = networks.network().forward(batch, networks.network().new_pool(2))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4)
    assert 1e-3 < float((found[1] - exact).abs().max()) < 0.5


def test_pieces_of_many_lengths_are_read_side_by_side_in_plain_torch() -> None:
    network, lengths = networks.network(plain=True), [1, 70, 3, 1, 64]
    pieces = [IDS[:length] for length in lengths]
    together = network.new_pool(5)
    batch = Batch.of(pieces, [4, 2, 0, 1, 3])
    logits = network.forward(batch.wanting(batch.ends), together)
    for i, piece in enumerate(pieces):
        alone = network.new_pool(1)
        single = network.forward(Batch.of([piece], [0]).wanting([len(piece) - 1]), alone)
        torch.testing.assert_close(logits[[i]], single, rtol=0, atol=2e-5)
        for name, values in together.tensors.items():
            expected = alone.tensors[name][:, 0]
            torch.testing.assert_close(values[:, batch.rows[i]], expected, rtol=0, atol=2e-5)


def test_a_foreign_pool_and_unknown_tokens_are_refused() -> None:
    network = networks.network()
    pool = networks.network(replace(SMALL, num_layers=1, value_rank=0), plain=True).new_pool(1)
    with pytest.raises(ValueError, match="not made by this network"):
        network.forward(Batch.of_tokens([1], [0]), pool)
    with pytest.raises(IndexError, match="from 0 to 499"):
        network.forward(Batch.of_tokens([500], [0]), network.new_pool(1))
    with pytest.raises(IndexError, match="rows"):
        network.logits(network.new_pool(1), [1])
