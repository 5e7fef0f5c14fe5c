"""Memory holds a checkpoint's weights once, in their serving dtype."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import WeightDtype
from tests.model.heinsen.test_loading import RETURNED_AT_ONCE, ROOT
from tests.model.rwkv7 import networks
from tests.model.rwkv7.networks import SMALL

SCRIPT = """
import sys, threading, torch
from pathlib import Path
from model.rwkv7.checkpoint import load_network

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

small, large, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
load_network(small, torch.device("cpu"), dtype)  # compiles, and imports what it needs
before, peak, loaded = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not loaded.wait(0.001):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch)
watching.start()
network = load_network(large, torch.device("cpu"), dtype)
loaded.set()
watching.join()
served = network.weight_bytes + network.weights.embed.nbytes
print(max(peak, anonymous()) - before, served)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("folder", [False, True], ids=["pth", "safetensors"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "float32"),
        (torch.float32, "float32"),
        (torch.float32, "int8"),
    ],
    ids=str,
)
def test_loading_holds_no_weight_twice(
    tmp_path: Path, stored: torch.dtype, dtype: WeightDtype, folder: bool
) -> None:
    """Embedding and head are the largest weights."""
    small = networks.save_pth(tmp_path / "small.pth", networks.weights(SMALL))
    config = replace(SMALL, vocab_size=24_000, d_emb=512, num_heads=8, num_layers=6, d_ffn=2048)
    made = networks.weights(config, stored)
    if folder:
        large = networks.save_hf(tmp_path / "large", config, made, num_shards=2)
    else:
        large = networks.save_pth(tmp_path / "large.pth", made)
    del made
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, small, large, dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | RETURNED_AT_ONCE,
    )
    peak, served = map(int, done.stdout.split())
    assert 0.9 * served < peak <= 1.15 * served
