"""RWKV-7 against the package rwkv, which its author publishes, in float32."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.rwkv7.checkpoint import load_network, published_state
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import CPU, SMALL

pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_logits_and_states_are_those_of_the_package(tmp_path: Path) -> None:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read at its import
    package = pytest.importorskip("rwkv.model")
    path = networks.save_pth(tmp_path / "model.pth", networks.weights(SMALL))
    theirs = package.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
    ids = np.random.default_rng(3).integers(1, SMALL.vocab_size, 90)
    expected, state = theirs.forward(ids.tolist(), None, full_output=True)
    for plain in (True, False):
        network = load_network(path, CPU, "float32", plain=plain)
        pool = network.new_pool(1)
        logits = network.forward(Batch.of([ids], [0]).wanting(np.arange(len(ids))), pool)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        found = published_state(pool, 0)
        for layer in range(SMALL.num_layers):
            for place, name in enumerate(("att_shift", "wkv", "ffn_shift")):
                ours = found[name][layer].float()
                torch.testing.assert_close(ours, state[3 * layer + place], rtol=1e-4, atol=1e-4)
