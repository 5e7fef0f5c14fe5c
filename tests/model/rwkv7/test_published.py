"""The table of sizes in the documentation is what is computed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import WeightDtype
from model.rwkv7 import weights
from model.rwkv7.published import PUBLISHED, num_parameters, table, weight_bytes
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import SMALL

ROOT = Path(__file__).parents[3]


def test_the_documentation_has_the_table() -> None:
    command = [sys.executable, "-m", "model.rwkv7.published"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed == "\n".join(table()) + "\n"
    assert printed in (ROOT / "docs" / "models.md").read_text()


def test_the_numbers_of_parameters_are_the_publishers() -> None:
    expected = {
        "0.1 B": 191_034_624,
        "0.4 B": 450_767_872,
        "1.5 B": 1_527_404_544,
        "2.9 B": 2_947_735_040,
        "7.2 B": 7_199_141_888,
    }
    assert {name: num_parameters(PUBLISHED[name]) for name in expected} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_bytes_are_those_of_a_network_that_serves(dtype: WeightDtype) -> None:
    network = networks.network(SMALL, dtype, plain=True)
    assert network.weight_bytes == weights.num_bytes(SMALL, dtype)
    assert network.weight_bytes + network.weights.embed.nbytes == weight_bytes(SMALL, dtype)
    assert network.num_parameters == num_parameters(SMALL)
    pool = network.new_pool(1)
    held = sum(tensor.nbytes for tensor in pool.tensors.values())
    assert held == SMALL.state_spec.num_bytes


def test_decays_stay_exact() -> None:
    mix = networks.network(SMALL, "int8", plain=True).weights.layers[1].time_mix
    first = mix.first
    assert first is not None
    found = [maps.down.weight.dtype for maps in (mix.decay, mix.rate, first, mix.gate)]
    assert found == [torch.float32, *[torch.bfloat16] * 3]
    assert mix.receptance.weight.dtype == torch.int8
