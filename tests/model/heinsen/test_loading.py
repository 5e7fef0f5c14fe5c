"""Memory holds a checkpoint's weights once, in their serving dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import WeightDtype
from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level

ROOT = Path(__file__).parents[3]

RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Otherwise glibc keeps an unpredictable number of freed megabytes."""

SCRIPT = """
import sys, threading, torch
from pathlib import Path
from model.heinsen.checkpoint import load

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

def served(module):
    return sum(
        value.untyped_storage().nbytes()
        for part in module.modules()
        for value in {**vars(part), **part._parameters}.values()
        if isinstance(value, torch.Tensor)
    )

small, large, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
load(small, torch.device("cpu"), dtype)  # compiles, and imports what it needs
before, peak, loaded = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not loaded.wait(0.001):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch)
watching.start()
network = load(large, torch.device("cpu"), dtype).network
loaded.set()
watching.join()
print(max(peak, anonymous()) - before, served(network))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"), (torch.float32, "int8")],
    ids=str,
)
def test_loading_holds_no_weight_twice(
    tmp_path: Path, tiny_checkpoint: Path, stored: torch.dtype, dtype: WeightDtype
) -> None:
    """The largest weight, the embedding, is a third of all weights, as in the published network."""
    words = byte_level.train(["the cat sat"], 300, ["<|endoftext|>"])
    config = ModelConfig(vocab_sz=24_000, d_emb=512, n_layers=10, n_heads=16)
    torch.manual_seed(0)
    weights = {name: w.to(stored) for name, w in LanguageModel(config).state_dict().items()}
    checkpoint.save(tmp_path / "large", config, weights, words, None)
    del weights
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_checkpoint, tmp_path / "large", dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | RETURNED_AT_ONCE,
    )
    peak, served = map(int, done.stdout.split())
    assert peak <= 1.15 * served
